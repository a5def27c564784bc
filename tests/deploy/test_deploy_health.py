"""The manifests' health checks, on a real head with their parameters and token authentication.

The head runs in its own network and process namespace, so that its ports are free and no process
outlives the test.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.deploy.manifests import KUBERNETES, documents

PROGRAM = """
set -eu
ip link set lo up
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN={token} RAY_TMPDIR={folder} \
RAY_USAGE_STATS_ENABLED=0 HOME={folder}
ray start --head --block --port=6379 --node-ip-address=127.0.0.1 --include-dashboard=true \\
  --object-store-memory=100000000 {parameters} >{folder}/log 2>&1 &
started=$!
for probe in {head} {worker}; do
  up=
  for _ in $(seq 120); do
    if sh -c "$probe"; then up=1; break; fi
    kill -0 "$started" || break
    sleep 1
  done
  if [ -z "$up" ]; then echo "not healthy: $probe"; tail -20 {folder}/log; exit 1; fi
done
refused=$(wget -S -O- http://127.0.0.1:8265/api/jobs/ 2>&1 || true)
case $refused in *401*) ;; *) echo "without the token: $refused"; exit 1 ;; esac
wget -q -O- --header "Authorization: Bearer {token}" http://127.0.0.1:8265/api/jobs/ >/dev/null
wget -q -O- http://127.0.0.1:8080/metrics | grep -q '^ray_'
echo healthy
"""


@pytest.mark.long
@pytest.mark.slow
def test_the_health_checks_answer_on_a_guarded_head() -> None:
    """Probes need no token, other routes do, and metrics are on the manifests' port.

    The kubelet runs the probes without a token.
    """
    alone = ["unshare", "--net", "--pid", "--mount-proc", "--fork", "--kill-child"]
    if (
        not all(map(shutil.which, ("unshare", "ip", "wget")))
        or subprocess.run([*alone, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs unshare with its rights, ip and wget")
    (cluster,) = documents(KUBERNETES / "base" / "ray-cluster.yaml")
    head, (worker,) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    parameters = " ".join(f"--{name}={value}" for name, value in head["rayStartParams"].items())
    probes = [
        shlex.quote(
            group["template"]["spec"]["containers"][0]["livenessProbe"]["exec"]["command"][-1]
        )
        for group in (head, worker)
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # The path is short because Ray puts sockets below it, and the length of theirs is limited.
    with tempfile.TemporaryDirectory(prefix="head-") as folder:
        program = PROGRAM.format(
            token="0123456789abcdef" * 2,
            folder=folder,
            parameters=parameters,
            head=probes[0],
            worker=probes[1],
        )
        argv = [*alone, "bash", "-c", program]
        done = subprocess.run(
            argv, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=280
        )
    assert done.returncode == 0 and done.stdout.endswith("healthy\n"), done.stdout + done.stderr
