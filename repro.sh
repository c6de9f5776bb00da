#!/bin/sh
# repro.sh JOBS STAGE...: `dvc repro`, with the items of the named matrix stages run JOBS at a time, stage after stage.
# DVC itself runs one item after the other, but allows several `dvc repro` at once on different ones, which this uses.
set -eu
jobs=$1
shift
for stage in "$@"; do
    dvc stage list --name-only | grep "^$stage@" | xargs -P "$jobs" -n 1 dvc --wait-for-lock repro
done
dvc repro
