#!/usr/bin/env bash
# parallel.sh JOBS GROUP...: `dvc repro` of each group of stages, "a b", in turn, with their items JOBS at a time.
# DVC itself runs one item after the other, but allows several `dvc repro` at once on different ones, which this uses.
set -eu
jobs=$1
shift
for group in "$@"; do
    # one item without what it depends on: checking that would lock it for writing, and the others read it
    dvc stage list --name-only | grep -xE "(${group// /|})(@.*)?" | xargs -P "$jobs" -n 1 dvc --wait-for-lock repro --single-item
done
