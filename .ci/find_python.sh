#!/bin/sh
# Prints the first interpreter that can make the lab's environment: the one named, else python3.11, 3.12, 3.13.
# A name on PATH is not enough: it must start, be of such a version, and be able to make environments.
check='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
for python in ${1:-python3.11 python3.12 python3.13 python3 python}; do
    if command -v "$python" >/dev/null 2>&1 && "$python" -c "$check" >/dev/null 2>&1; then
        echo "$python"
        exit 0
    fi
done
echo "No Python 3.11, 3.12 or 3.13 that can make environments was found${1:+ under the name $1}." >&2
echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name one: make install PYTHON=/path" >&2
exit 1
