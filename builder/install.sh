#!/bin/sh
# install.sh REQUIREMENTS: installs these packages into /opt/venv, in a reproducible way. Runs while the image is built.
# The Dockerfile mounts it, so that it is in no layer. buildah of Debian 12 does not notice its changes: build with --no-cache.
set -eu
mtime=@$REPRODUCIBLE_MTIME # of every installed file; the Dockerfile sets it
packages=/opt/venv/lib

[ -x /opt/venv/bin/python ] || python3 -m venv --without-pip /opt/venv
python3 -m venv /tmp/pip
/tmp/pip/bin/python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --root-user-action=ignore \
    -r "$1" -c /opt/venv/constraints.txt
rm -r /tmp/pip
find $packages -type d -name tests -prune -exec rm -r {} +
# Bytecode: without it, a fresh container would compile everything at every start. With unchecked-hash Python compares no times.
# Some packages contain templates and files for another Python, which do not compile and are never imported.
# -S and the seed make the bytecode reproducible: otherwise that of modules which Python itself has imported varies between runs.
# `-newermt` skips the files of the layer below: touching one would copy it into this layer.
find $packages -name '*.py' -newermt "$mtime" \
    | PYTHONHASHSEED=0 /opt/venv/bin/python -S -m compileall -qq -j 0 --invalidation-mode unchecked-hash -i - || true
# The same modification time for all files, so that a rebuild makes the same layer.
find /opt/venv -newermt "$mtime" -exec touch -h -d "$mtime" {} +
