#!/bin/sh
# parallel.sh JOBS STAGE...: `dvc repro` of the named stages, a matrix stage's items, JOBS at a time, stage after stage.
# DVC itself runs one item after the other, but allows several `dvc repro` at once on different ones, which this uses.
set -eu
jobs=$1
shift
for stage in "$@"; do
    # one item without what it depends on: checking that would lock it for writing, and the others read it
    dvc stage list --name-only | grep -x "$stage\(@.*\)\?" | xargs -P "$jobs" -n 1 dvc --wait-for-lock repro --single-item
done
