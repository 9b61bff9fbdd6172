#!/bin/sh
# Install every plugin in a directory, after what it needs from the system.
#
#     install_plugins.sh DIRECTORY
#
# DEVICE is what torch, if a plugin needs it, is to run on: cpu (the default) or cuda. With TORCH_INDEX_URL set, it comes
# from that package index. What else a plugin needs on a GPU, it declares as its extra cuda.
set -eu

directory=$1

index=${TORCH_INDEX_URL:-}
case "${DEVICE:-cpu}" in
cpu)
    if [ -z "$index" ]; then
        echo "TORCH_INDEX_URL is not set: where a plugin needs torch, it comes with the CUDA libraries, of several GB" >&2
    fi
    ;;
cuda) ;; # what the default index has for Linux on x86-64
*)
    echo "DEVICE=$DEVICE is not allowed: it must be cpu or cuda" >&2
    exit 1
    ;;
esac

set --
for plugin in "$directory"/*/; do
    [ -d "$plugin" ] || continue # the pattern itself, where nothing matches it
    if [ ! -f "$plugin/pyproject.toml" ]; then
        echo "$plugin is not a plugin: it has no pyproject.toml" >&2
        exit 1
    fi
    if [ "${DEVICE:-cpu}" = cuda ] && grep -q '^cuda = ' "$plugin/pyproject.toml"; then
        plugin="${plugin}[cuda]"
    fi
    set -- "$@" "$plugin"
done
if [ $# -eq 0 ]; then
    echo "There is no plugin in $directory: the server will have no task, no model and no route." >&2
    exit 0
fi

"$(dirname "$0")/install_system_dependencies.sh" "$directory"

# Together, so that plugins may depend on each other, whatever their order. Of builds of one release of torch, pip takes
# that of the named index: its version (2.6.0+cpu) counts as the later one.
python -m pip install ${index:+--extra-index-url "$index"} "$@"
