#!/bin/sh
# Write .env, from which the compose file takes Ray's token, the storage's keys and Grafana's password. One that is there already stays.
set -eu
cd "$(dirname "$0")"
random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }

[ ! -e .env ] || exit 0
umask 077
cat > .env <<END
RAY_AUTH_TOKEN=$(random 32)
AWS_ACCESS_KEY_ID=$(random 10)
AWS_SECRET_ACCESS_KEY=$(random 20)
GRAFANA_PASSWORD=$(random 12)
END
