#!/bin/sh
# Run by cluster.sh as root on a host whose units are stopped: "switch.sh next" puts the environment and units that "setup.sh ... beside" made in
# the place of those used so far, "switch.sh back" puts these back, if the last "next" got so far.
set -eu
cd "${DISTNADAM_ROOT:-/opt/distnadam}"
units=${DISTNADAM_UNITS:-/etc/systemd/system}
point() { ln -sfn "$1" venv.new && mv -T venv.new venv; }
case $1 in
next)
    rm -rf before units-before
    [ -L venv ] || { mv venv venv-1 && ln -s venv-1 venv; } # what was first installed; its scripts name it by the link
    now=$(readlink venv)
    [ "$now" = venv-1 ] && to=venv-2 || to=venv-1
    "$to/bin/python" -c "import distnadam" # before anything has changed
    mkdir units-before
    cp -p "$units"/distnadam-*.service units-before
    echo "$now" > before
    install -m 0644 units-next/*.service "$units"
    point "$to" ;;
back)
    [ -e before ] || exit 0
    install -m 0644 units-before/*.service "$units"
    point "$(cat before)"
    rm before ;;
*)
    exit 2 ;;
esac
systemctl daemon-reload
