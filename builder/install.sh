#!/bin/sh
# install.sh REQUIREMENTS: installs them into /opt/venv as a layer of the image wants them. Runs while the image is built.
# It is mounted, so that it is in no layer; buildah of Debian 12 does not notice when it changes: build with --no-cache then.
set -eu
then=@315532800 # 1980-01-01, the time of every installed file
packages=/opt/venv/lib

[ -x /opt/venv/bin/python ] || python3 -m venv --without-pip /opt/venv
python3 -m venv /tmp/pip
/tmp/pip/bin/python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --root-user-action=ignore \
    -r "$1" -c /opt/venv/constraints.txt
rm -r /tmp/pip
find $packages -type d -name tests -prune -exec rm -r {} +
# Bytecode for good (unchecked-hash: Python compares no times): a fresh container would compile it at every start.
# Some packages carry templates and files for another Python, which do not compile and are never imported.
# -S and the seed: otherwise what Python itself has imported is written a little differently from run to run.
# `-newermt` passes over the files of the layer below: to touch one would copy it into this layer.
find $packages -name '*.py' -newermt $then \
    | PYTHONHASHSEED=0 /opt/venv/bin/python -S -m compileall -qq -j 0 --invalidation-mode unchecked-hash -i - || true
# One time for all, so that building again gives the same layer.
find /opt/venv -newermt $then -exec touch -h -d $then {} +
