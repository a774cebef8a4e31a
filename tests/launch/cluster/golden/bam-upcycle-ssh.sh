#!/bin/bash
# The ranks of one host: node.sh NODE
cd /shared/me || exit 2
export PET_NNODES=2 PET_NODE_RANK="$1"
export PET_MASTER_ADDR=node1 PET_MASTER_PORT=29500
/shared/me/.venv/bin/longctx train runs/bam-upcycle/job/recipe.toml --out runs/bam-upcycle --nproc 8 &
ranks=$!

# ssh closes this script's input when the connection ends: the ranks then save and stop.
exec 3<&0
{ cat <&3; kill -TERM "$ranks"; } > /dev/null 2>&1 &
wait "$ranks"
status=$?
kill $! 2> /dev/null
exit $status
