#!/usr/bin/env bash
# parallel.sh JOBS GROUP...: `dvc repro` of each group of stages, "a b", in turn, with their items JOBS at a time.
# DVC itself runs one item after the other, but allows several `dvc repro` at once on different ones, which this uses.
set -eu
jobs=$1
shift
all=$(dvc stage list --name-only)
for group in "$@"; do
    # one item without what it depends on: checking that would lock it for writing, and the others read it
    for stage in $group; do grep -xE "$stage(@.*)?" <<<"$all"; done |
        xargs -P "$jobs" -n 1 dvc --wait-for-lock repro --single-item
done
