#!/usr/bin/env bash
# parallel.sh JOBS STAGE...: `dvc repro` of each stage in turn, the items of one stage JOBS at a time.
# DVC runs one item after the other, but allows several `dvc repro` at once on different ones.
set -eu
jobs=$1
shift
all=$(dvc stage list --name-only)
for stage in "$@"; do
    # one item without what it depends on: checking that would lock it for writing, and the others read it
    grep -xE "($stage)(@.*)?" <<<"$all" | xargs -P "$jobs" -n 1 dvc --wait-for-lock repro --single-item
done
