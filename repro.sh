#!/bin/sh
# `dvc repro`, with the runs of the matrix trained and evaluated several at a time: repro.sh [JOBS].
# DVC runs one stage after the other; it allows several `dvc repro` at once on different stages, which this uses.
set -eu
jobs=${1:-2}
each() {
    dvc stage list --name-only | grep "^$1@" | xargs -P "$jobs" -n 1 dvc --wait-for-lock repro
}
dvc repro data
each supervised
each evaluate
dvc repro
