#!/bin/sh
# Install every plugin in a directory, after what it needs from the system.
#
#     install_plugins.sh DIRECTORY
#
# With TORCH_INDEX_URL set, torch comes from that package index; otherwise it comes as any other dependency does.
set -eu

directory=$1

set --
for plugin in "$directory"/*/; do
    [ -d "$plugin" ] || continue # the pattern itself, where nothing matches it
    if [ ! -f "$plugin/pyproject.toml" ]; then
        echo "$plugin is not a plugin: it has no pyproject.toml" >&2
        exit 1
    fi
    set -- "$@" "$plugin"
done
if [ $# -eq 0 ]; then
    echo "There is no plugin in $directory: the server will have no task, no model and no route." >&2
    exit 0
fi

for plugin in "$@"; do
    if [ -f "$plugin/install_system_dependencies.sh" ]; then
        (cd "$plugin" && bash ./install_system_dependencies.sh)
    fi
done

if [ -n "${TORCH_INDEX_URL:-}" ]; then
    python -m pip install --no-cache-dir --index-url "$TORCH_INDEX_URL" torch
fi
# Together, so that plugins may depend on each other, whatever their order.
python -m pip install --no-cache-dir "$@"
