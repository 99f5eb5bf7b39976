#!/usr/bin/env bash
# Names the new place of a program, for one version.
echo "launch/capacity.sh is now launch/benchmarks/capacity.sh" >&2
exit 2
