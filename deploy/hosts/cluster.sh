#!/bin/sh
# A Ray cluster on hosts that you reach by SSH and where you may sudo, of Python 3.11 or newer. For instance:
#   ./cluster.sh install 10.0.0.1 10.0.0.2 10.0.0.3     the first is the head; addresses on the private network
#   ./cluster.sh start   10.0.0.1 10.0.0.2 10.0.0.3     then ./cluster.sh status, and stop
#   ./cluster.sh run     10.0.0.1 -- distnadam train digits --steps 1000
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
verb=$1 head=$2
shift 2

on() { # on HOST COMMAND...: run there as root
    host=$1; shift
    ssh -o BatchMode=yes "$host" sudo "$@"
}

prepare() { # the wheel and one token for all, made once
    "${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$root/deploy/wheel" "$root"
    cp "$root/constraints.txt" "$root/deploy/wheel/"
    [ -e "$here/token" ] || (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$here/token")
}

install_on() { # install_on HOST: everything in its place, the units not yet started
    stage=$(mktemp -d)
    cp "$root"/deploy/wheel/* "$here"/*.service "$here/token" "$here/setup.sh" "$stage"
    sed "s/^HEAD_ADDRESS=.*/HEAD_ADDRESS=$head/; s/^NODE_ADDRESS=.*/NODE_ADDRESS=$1/" "$here/ray.env" > "$stage/ray.env"
    sed "s/^RAY_ADDRESS=.*/RAY_ADDRESS=$head:6379/" "$here/train.env" > "$stage/train.env"
    tar -C "$stage" -cf - . | ssh -o BatchMode=yes "$1" 'rm -rf ~/distnadam-install && mkdir -m 700 ~/distnadam-install && tar -C ~/distnadam-install -xf -'
    rm -rf "$stage"
    ssh -o BatchMode=yes "$1" 'sudo sh ~/distnadam-install/setup.sh ~/distnadam-install && rm -rf ~/distnadam-install'
}

case $verb in
install)
    prepare
    for host in "$head" "$@"; do
        echo "installing on $host"
        install_on "$host"
    done ;;
start)
    on "$head" systemctl enable --now distnadam-head.service
    for host in "$@"; do on "$host" systemctl enable --now distnadam-node.service; done ;;
stop)
    for host in "$@"; do on "$host" systemctl disable --now distnadam-node.service; done
    on "$head" systemctl disable --now distnadam-head.service ;;
status)
    on "$head" /opt/distnadam/run.sh ray status ;;
run)
    [ "${1:-}" = -- ] || usage
    shift
    on "$head" /opt/distnadam/run.sh "$@" ;;
*)
    usage ;;
esac
