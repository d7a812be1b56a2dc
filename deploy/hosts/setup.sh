#!/bin/sh
# Run by cluster.sh as root on each host: a user of its own, a virtual environment, the units, and settings that only that user reads.
# With "beside" only another environment and units, which nothing uses until switch.sh does.
set -eu
umask 022 # the user reads what root makes here, but for the token
from=$1
uid=${2:-642} # the same on every host, since a disk that they share knows users by number
python3 -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
if ! id distnadam >/dev/null 2>&1; then
    getent group distnadam >/dev/null || groupadd --system --gid "$uid" distnadam
    useradd --system --uid "$uid" --gid distnadam --create-home --home-dir /var/lib/distnadam --shell /usr/sbin/nologin distnadam
elif [ "$(id -u distnadam)" != "$uid" ]; then
    echo "the user distnadam is $(id -u distnadam) here, not $uid, and stays so: on a shared disk it is another user" >&2
fi

mkdir -p /opt/distnadam /etc/distnadam
venv=/opt/distnadam/venv
if [ "${3:-}" = beside ]; then
    [ -e "$venv" ] || { echo "nothing is installed here" >&2; exit 1; }
    [ "$(readlink "$venv" || echo venv-1)" = venv-1 ] && venv=/opt/distnadam/venv-2 || venv=/opt/distnadam/venv-1
    rm -rf "$venv" /opt/distnadam/units-next /opt/distnadam/before
fi
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --constraint "$from/constraints.txt" "$@"; }
wheel=$(ls "$from"/*.whl)
pip "$wheel[digits,fused,metrics,plot,s3]"
pip --force-reinstall --no-deps "$wheel" # pip takes a wheel of the same version for the one that is there

install -m 0755 "$from/switch.sh" /opt/distnadam/switch.sh
if [ "${3:-}" = beside ]; then
    mkdir /opt/distnadam/units-next
    install -m 0644 "$from"/*.service /opt/distnadam/units-next
    exit
fi

settle() { # settle FILE NAME: settings edited here are kept, but for the address of that name, which cluster.sh knows
    if [ -e "/etc/distnadam/$1" ]; then
        sed -i "s/^$2=.*/$(grep "^$2=" "$from/$1")/" "/etc/distnadam/$1"
    else
        install -m 0644 "$from/$1" "/etc/distnadam/$1"
    fi
}
install -m 0644 "$from"/*.service /etc/systemd/system/
settle ray.env HEAD_ADDRESS
settle ray.env NODE_ADDRESS
settle train.env RAY_ADDRESS
install -m 0400 -o distnadam "$from/token" /etc/distnadam/token

cat > /opt/distnadam/run.sh <<'END'
#!/bin/sh
# Run a command as the cluster's user, with its token and its storage's keys.
set -eu
cd /var/lib/distnadam
exec setpriv --reuid distnadam --regid distnadam --init-groups sh -c '
    set -a
    . /etc/distnadam/ray.env
    [ ! -e /etc/distnadam/storage.env ] || . /etc/distnadam/storage.env
    HOME=/var/lib/distnadam RAY_ADDRESS=$HEAD_ADDRESS:6379 PATH=/opt/distnadam/venv/bin:$PATH
    exec "$@"' run "$@"
END
chmod 0755 /opt/distnadam/run.sh
systemctl daemon-reload
