#!/bin/sh
# The job goes on with the image that a folder names: save, end the job and its cluster, and apply the folder. For instance, after
# its newTag was changed:
#   ./upgrade.sh overlays/large
set -eu
[ $# -eq 1 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ -e "$1/kustomization.yaml" ] || { echo "no kustomization.yaml in $1" >&2; exit 2; }
job=distnadam-digits
of() { kubectl "$@" --namespace distnadam; }
kubectl kustomize "$1" > /dev/null # a folder that does not render ends no job
cluster=$(of get rayjob "$job" --output 'jsonpath={.status.rayClusterName}')
[ -n "$cluster" ] || { echo "the job $job has no cluster yet, and nothing to save" >&2; exit 1; }
kubectl exec --namespace distnadam "svc/$cluster-head-svc" -- distnadam save "$job"
of delete rayjob "$job" --cascade=foreground --wait # until its cluster is gone too, which has the checkpoints' lock
if ! kubectl apply --kustomize "$1"; then
    echo "the job is ended, and saved in its --checkpoint-dir; apply the folder that it had, or this one again" >&2
    exit 1
fi
