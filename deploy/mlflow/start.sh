#!/usr/bin/env bash
# Start MLflow with logins on PostgreSQL. Without POSTGRES_URI, this starts a PostgreSQL as well.
#
#   DATA=./mlflow-data         folder for secrets, the database (without POSTGRES_URI) and artifacts
#   POSTGRES_URI=              postgresql://user:password@host/database of a running PostgreSQL
#   ARTIFACTS=$DATA/artifacts  a folder, or s3://bucket/path
#                              (with AWS_* and MLFLOW_S3_ENDPOINT_URL as usual)
#   HOST=127.0.0.1 PORT=5000 WORKERS=2
#
# Needs: pip install 'prompt-orchestrator[server]', and boto3 for S3. Without POSTGRES_URI also
# Debian's package postgresql, and a user other than root.
set -euo pipefail
umask 077

DATA=$(mkdir -p "${DATA:-mlflow-data}" && cd "${DATA:-mlflow-data}" && pwd)
HOST=${HOST:-127.0.0.1} PORT=${PORT:-5000} WORKERS=${WORKERS:-2}
ARTIFACTS=${ARTIFACTS:-$DATA/artifacts}
PYTHON=${PYTHON:-python3}

fail() { echo "$1" >&2; echo "  next: $2" >&2; exit 2; }
secret() { "$PYTHON" -c 'import secrets; print(secrets.token_urlsafe(24))'; }

"$PYTHON" -c 'import mlflow, psycopg, flask_wtf' 2>/dev/null ||
  fail "$PYTHON lacks mlflow, psycopg or Flask-WTF" "pip install 'prompt-orchestrator[server]', or set PYTHON"

# Secrets are generated at the first start, except those that are set in the environment.
if [ ! -f "$DATA/secrets.env" ]; then
  {
    echo "MLFLOW_FLASK_SERVER_SECRET_KEY=${MLFLOW_FLASK_SERVER_SECRET_KEY:-$(secret)}"
    echo "MLFLOW_AUTH_ADMIN_USERNAME=${MLFLOW_AUTH_ADMIN_USERNAME:-admin}"
    echo "MLFLOW_AUTH_ADMIN_PASSWORD=${MLFLOW_AUTH_ADMIN_PASSWORD:-$(secret)}"
  } >"$DATA/secrets.env"
fi
set -a; . "$DATA/secrets.env"; set +a

if [ -z "${POSTGRES_URI:-}" ]; then
  programs=$(dirname "$(ls -d /usr/lib/postgresql/*/bin/initdb 2>/dev/null | sort -V | tail -n 1)")
  [ -x "$programs/initdb" ] || programs=$(dirname "$(command -v initdb || echo /none)")
  [ -x "$programs/initdb" ] || fail "no PostgreSQL here" "apt-get install postgresql, or set POSTGRES_URI"
  [ "$(id -u)" -ne 0 ] || fail "PostgreSQL refuses to run as root" "run this as another user, or set POSTGRES_URI"
  # The database listens only on a socket in a private folder, so it needs no password or port.
  database=$DATA/postgres
  [ -f "$database/PG_VERSION" ] || "$programs/initdb" -D "$database" -U mlflow -A trust -E UTF8 >/dev/null
  "$programs/pg_ctl" -D "$database" -w -l "$DATA/postgres.log" -o "-c listen_addresses= -k $DATA" start >/dev/null
  trap '"$programs/pg_ctl" -D "$database" -m fast -w stop >/dev/null' EXIT
  for name in mlflow mlflow_auth; do
    "$programs/psql" -h "$DATA" -U mlflow -d postgres -qAtc "SELECT 1 FROM pg_database WHERE datname = '$name'" |
      grep -q 1 || "$programs/createdb" -h "$DATA" -U mlflow "$name"
  done
  STORE="postgresql+psycopg://mlflow@/mlflow?host=$DATA"
  LOGINS="postgresql+psycopg://mlflow@/mlflow_auth?host=$DATA"
else
  STORE=${POSTGRES_URI/#postgresql:/postgresql+psycopg:}
  LOGINS=$STORE  # logins have their own tables beside MLflow's
fi

cat >"$DATA/auth.ini" <<INI
[mlflow]
default_permission = ${DEFAULT_PERMISSION:-READ}
database_uri = ${LOGINS//%/%%}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI

# Addresses hold passwords, and other users can read command lines: pass them in the environment.
export MLFLOW_AUTH_CONFIG_PATH=$DATA/auth.ini MLFLOW_BACKEND_STORE_URI=$STORE
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
PATH=$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')"):$PATH
case $ARTIFACTS in *://*) ;; *) mkdir -p "$ARTIFACTS" ;; esac

echo "MLflow: http://$HOST:$PORT   logins: $DATA/secrets.env   artifacts: $ARTIFACTS" >&2
"$PYTHON" -m mlflow server --host "$HOST" --port "$PORT" --workers "$WORKERS" --app-name basic-auth \
  --artifacts-destination "$ARTIFACTS" ${ALLOWED_HOSTS:+--allowed-hosts "$ALLOWED_HOSTS"} &
server=$!
trap 'kill -TERM "$server" 2>/dev/null || true' TERM INT
wait "$server" || status=$?
exit "${status:-0}"
