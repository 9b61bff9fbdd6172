#!/bin/sh
# Install what every plugin in a directory needs from the system.
#
#     install_system_dependencies.sh DIRECTORY
set -eu

for plugin in "$1"/*/; do
    if [ -f "$plugin/install_system_dependencies.sh" ]; then
        (cd "$plugin" && bash ./install_system_dependencies.sh)
    fi
done
