#!/bin/sh
# Run by cluster.sh as root on each host: a user of its own, a virtual environment, the units, and settings that only that user reads.
set -eu
from=$1
id distnadam >/dev/null 2>&1 || useradd --system --create-home --home-dir /var/lib/distnadam --shell /usr/sbin/nologin distnadam
python3 -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
mkdir -p /opt/distnadam /etc/distnadam
[ -x /opt/distnadam/venv/bin/python ] || python3 -m venv /opt/distnadam/venv
/opt/distnadam/venv/bin/python -m pip install --quiet --constraint "$from/constraints.txt" "$(ls "$from"/*.whl)[digits,fused,metrics,plot,s3]"

install -m 0644 "$from"/*.service /etc/systemd/system/
install -m 0644 "$from/ray.env" /etc/distnadam/ray.env
[ -e /etc/distnadam/train.env ] || install -m 0644 "$from/train.env" /etc/distnadam/train.env
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
