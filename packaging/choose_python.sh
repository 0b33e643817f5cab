#!/bin/sh
# Prints the path of the Python to set the environment up with: the first candidate that meets every need. The
# arguments, if any, are the candidates. The default is the version that is tested most, then whatever `python3` is,
# then the newest.
#
# Needed: Python 3.11 to 3.14; venv with ensurepip, to create the environment; and Python.h, with which vLLM compiles
# models. Debian has the last two in packages of their own.

# Prints the version, then a blank and what is wrong with it, if anything, with the names of Debian's packages.
probe='
import importlib.util, os, sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
missing = []
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    missing.append("is not 3.11 to 3.14")
else:
    if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
        missing.append("lacks venv or ensurepip (Debian: apt install python%s-venv)" % version)
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        missing.append("lacks Python.h (Debian: apt install python%s-dev)" % version)
print(" ".join([version, " and ".join(missing)]).strip())
'

[ $# -gt 0 ] || set -- python3.11 python3 python3.14 python3.13 python3.12
found=
for candidate; do
    path=$(command -v "$candidate") || continue
    # A launcher may be on the path without a Python behind it.
    answer=$("$path" -c "$probe" 2>/dev/null) || continue
    case $answer in
        *" "*) found="$found
  $path: Python $answer" ;;
        *) echo "$path"; exit 0 ;;
    esac
done

if [ -n "$found" ]; then
    echo "No Python here can set the environment up:$found" >&2
else
    echo "None of these runs as a Python: $*. Needed: 3.11 to 3.14." \
        "On Debian: apt install python3 python3-venv python3-dev" >&2
fi
exit 1
