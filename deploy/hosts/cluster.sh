#!/bin/sh
# A Ray cluster on hosts that you reach by SSH and where you may sudo, of Python 3.11 or newer. For instance:
#   ./cluster.sh install 10.0.0.1 10.0.0.2 10.0.0.3     the first is the head; addresses on the private network
#   ./cluster.sh start   10.0.0.1 10.0.0.2 10.0.0.3     then ./cluster.sh status, and stop
#   ./cluster.sh run     10.0.0.1 -- distnadam train digits --steps 1000
#   ./cluster.sh add     10.0.0.1 10.0.0.4              one more host, the others left as they are
#   ./cluster.sh upgrade 10.0.0.1 10.0.0.2 10.0.0.3     this copy's version on all, the run going on from where it stops
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
stage=
trap '[ -z "$stage" ] || rm -rf "$stage"' EXIT
trap 'exit 130' INT
trap 'exit 143' HUP TERM
usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
verb=$1 head=$2
shift 2

quote() { # quote WORD...: the words as a shell reads them, since ssh hands one line to the host's
    for word in "$@"; do printf "'%s' " "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")"; done
}

on() { # on HOST COMMAND...: run there as root
    host=$1; shift
    ssh -o BatchMode=yes "$host" "sudo $(quote "$@")"
}

prepare() { # the wheel and one token for all, made once
    rm -f "$root"/deploy/wheel/*.whl # of another version, which would be taken for this one
    "${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$root/deploy/wheel" "$root"
    cp "$root/constraints.txt" "$root/deploy/wheel/"
    [ -e "$here/token" ] || (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$here/token")
}

# What a host does with what comes: the token in it must not stay where installing fails.
receive='set -eu
at=$(mktemp -d)
trap "rm -rf \"$at\"" EXIT
trap "exit 1" HUP INT TERM
tar -C "$at" -xf -
sudo sh "$at/setup.sh" "$at"'

install_on() { # install_on HOST [beside]: everything in its place, the units not yet started; or beside what is there
    echo "installing on $1"
    stage=$(mktemp -d)
    cp "$root"/deploy/wheel/* "$here"/*.service "$here/token" "$here/setup.sh" "$here/switch.sh" "$stage"
    sed "s/^HEAD_ADDRESS=.*/HEAD_ADDRESS=$head/; s/^NODE_ADDRESS=.*/NODE_ADDRESS=$1/" "$here/ray.env" > "$stage/ray.env"
    sed "s/^RAY_ADDRESS=.*/RAY_ADDRESS=$head:6379/" "$here/train.env" > "$stage/train.env"
    tar -C "$stage" -cf - . | ssh -o BatchMode=yes "$1" "$receive ${DISTNADAM_UID:-642} ${2:-}" || return 1
    rm -rf "$stage"
    stage=
}

# These three are asked whether they succeed, where "set -e" does not hold.
start_all() { # start_all HOST...: the head, then these
    on "$head" systemctl start distnadam-head.service || return 1
    for host in "$@"; do on "$host" systemctl start distnadam-node.service || return 1; done
}

stop_all() { # stop_all HOST...: the run, which saves, these, then the head; units that are enabled stay so
    on "$head" systemctl stop distnadam-train.service || return 1
    for host in "$@"; do on "$host" systemctl stop distnadam-node.service || return 1; done
    on "$head" systemctl stop distnadam-head.service
}

switch() { # switch next|back HOST...
    which=$1; shift
    for host in "$@"; do on "$host" sh /opt/distnadam/switch.sh "$which" || return 1; done
}

start_on() { on "$1" systemctl enable --now distnadam-node.service; }

case $verb in
install)
    prepare
    for host in "$head" "$@"; do install_on "$host"; done ;;
add)
    [ -e "$here/token" ] || { echo "no $here/token: add from the copy that the others were installed from" >&2; exit 1; }
    prepare
    for host in "$@"; do install_on "$host"; start_on "$host"; done ;;
start)
    on "$head" systemctl enable --now distnadam-head.service
    for host in "$@"; do start_on "$host"; done ;;
stop)
    echo "stopping the run on $head, where there is one: distnadam-train.service, which would start the head again"
    on "$head" systemctl disable --now distnadam-train.service
    for host in "$@"; do on "$host" systemctl disable --now distnadam-node.service; done
    on "$head" systemctl disable --now distnadam-head.service ;;
upgrade)
    prepare
    for host in "$head" "$@"; do
        install_on "$host" beside || { echo "it cannot be installed on $host: all hosts, and the run, go on with the version that they have" >&2; exit 1; }
    done
    runs=$(on "$head" systemctl is-active distnadam-train.service || true)
    failed=0
    echo "stopping the run on $head, which saves, and the cluster"
    if ! { stop_all "$@" && switch next "$head" "$@" && start_all "$@"; }; then
        failed=1
        echo "upgrading failed: going back to the version before" >&2
        if ! { stop_all "$@" && switch back "$head" "$@" && start_all "$@"; }; then
            echo "the run is stopped; its newest checkpoint is in the --checkpoint-dir of /etc/distnadam/train.env on $head" >&2
            exit 1
        fi
    fi
    case $runs in active | activating) on "$head" systemctl start distnadam-train.service ;; esac
    exit "$failed" ;;
status)
    on "$head" /opt/distnadam/run.sh ray status ;;
run)
    [ "${1:-}" = -- ] || usage
    shift
    on "$head" /opt/distnadam/run.sh "$@" ;;
*)
    usage ;;
esac
