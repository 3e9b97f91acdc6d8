#!/bin/sh
# The article's server: starts the service in the background and prints its log lines until it is ready.
#
#   sh run_autoglm_server.sh                           the pocket model at http://127.0.0.1:8000/v1
#   sh run_autoglm_server.sh start autoglm-phone-9b --plan int4
#   sh run_autoglm_server.sh status|stop|restart|logs [--port 8000]
#   sh run_autoglm_server.sh start --help              everything else
set -eu
home=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
python=${LABKIT_PYTHON:-$home/.venv/bin/python}
if [ ! -x "$python" ]; then
    python=$(command -v python3) || { echo "[ERROR] No Python found: run 'make install' in $home first" >&2; exit 1; }
fi
if ! "$python" -c 'import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, ("fastapi", "torch"))))'; then
    echo "[ERROR] The lab is not installed for $python: run 'make install' in $home first" >&2
    exit 1
fi
PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "$python" -m labkit.client.launch "$@"
