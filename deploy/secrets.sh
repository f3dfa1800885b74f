#!/usr/bin/env bash
# Make the passwords that docker compose passes on as files, once, for whoever may read this folder.
set -euo pipefail
cd "$(dirname "$0")"
directory=${CORTEX_SECRETS:-secrets}
umask 077
mkdir -p "$directory"
cd "$directory"
for name in grafana_password postgres_password s3_key s3_secret; do
    [[ -s $name ]] || od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$name"
done
printf '{"identities": [{"name": "cortex", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin"]}]}\n' \
    "$(<s3_key)" "$(<s3_secret)" >s3_accounts.json.new
# In the place of the file from before, which nobody may write.
mv -f s3_accounts.json.new s3_accounts.json
# The containers' users are not this one; compose mounts the files as they are, so the folder is what guards them.
chmod 0444 ./*
