"""A Ray cluster started with ``ray start``: a head and a worker, each in its own network.

The cluster requires a token.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

HEAD, WORKER = "10.187.0.1", "10.187.0.2"
LIMIT_S = 120.0  # only what hangs takes this long
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
# Variables of this process's environment that must not leak into the cluster.
OURS = (
    "RAY_",
    "MLFLOW_",
    "ORCHESTRATOR_",
    "PYTHONPATH",
)


class Network:
    """Two connected network namespaces, each held by a process that also has its own mounts.

    Where this process may not create namespaces, both nodes use this machine's loopback.
    """

    def __init__(self) -> None:
        self.holders: list[subprocess.Popen[bytes]] = []
        self.apart = os.geteuid() == 0 and bool(shutil.which("ip")) and self._made()

    def _made(self) -> bool:
        try:
            for _ in (HEAD, WORKER):
                holder = subprocess.Popen(
                    ["unshare", "--net", "--mount", "sleep", "100000"], stderr=subprocess.DEVNULL
                )
                self.holders.append(holder)
            ours = os.readlink("/proc/self/ns/mnt")
            deadline = time.monotonic() + 5
            while any(os.readlink(f"/proc/{it.pid}/ns/mnt") == ours for it in self.holders):
                if time.monotonic() > deadline or any(it.poll() is not None for it in self.holders):
                    raise OSError("no namespace of its own")
                time.sleep(0.01)
            one, other = (str(holder.pid) for holder in self.holders)
            ends = ["ip", "link", "add", "name", "wire", "netns", one, "type", "veth"]
            subprocess.run(
                [*ends, "peer", "name", "wire", "netns", other], check=True, capture_output=True
            )
            for node, address in enumerate((HEAD, WORKER)):
                up = ("link set wire up", "link set lo up", "route add default dev wire")
                for command in (f"addr add {address}/24 dev wire", *up):
                    subprocess.run(
                        self.inside(node, ["ip", *command.split()]), check=True, capture_output=True
                    )
        except (OSError, subprocess.CalledProcessError):
            self.close()
            return False
        return True

    def inside(self, node: int, command: list[str]) -> list[str]:
        """Return the command to run in a node's network: 0 is the head's, 1 the worker's."""
        if not self.holders:
            return command
        spaces = f"/proc/{self.holders[node].pid}/ns"
        return ["nsenter", f"--net={spaces}/net", f"--mount={spaces}/mnt", "--wd=.", *command]

    def address(self, node: int) -> str:
        return (HEAD, WORKER)[node] if self.apart else "127.0.0.1"

    def inhabitants(self) -> list[psutil.Process]:
        """Return the processes in the nodes' networks, without the holders."""
        ours = {os.readlink(f"/proc/{holder.pid}/ns/net") for holder in self.holders}
        holders = {holder.pid for holder in self.holders}
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if (
                    process.pid not in holders
                    and os.readlink(f"/proc/{process.pid}/ns/net") in ours
                ):
                    found.append(process)
        return found

    def close(self) -> None:
        for holder in self.holders:
            holder.kill()
            holder.wait()
        self.holders = []


class RayProcesses:
    """A head and a worker, both started with ``ray start --block``.

    The head's dashboard listens on the head's loopback.
    """

    def __init__(self, cpus: int = 1, redis: bool = False) -> None:
        """Prepare folders, ports and network; with ``redis``, the head's state is kept in Redis.

        The Redis server runs in the head's network and survives the head.
        """
        self.network = Network()
        self.cpus = cpus
        self.folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short, for socket paths
        self.token = self.folder / "token"
        self.token.write_text(secrets.token_hex(32), encoding="utf-8")
        self.port, self.dashboard, self.client, self.redis_port, *self.agents = free_ports(8)
        self.redis = self._start_redis() if redis else None
        (self.folder / "t").mkdir()
        if self.network.apart:
            # A node identifies itself by a file in this folder, so the worker mounts its own disk
            # at the same path.
            disk = ["mount", "-t", "tmpfs", "tmpfs", str(self.folder / "t")]
            subprocess.run(self.network.inside(1, disk), check=True)
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.processes: dict[int, list[psutil.Process]] = {}

    def _start_redis(self) -> subprocess.Popen[bytes]:
        command = [
            "redis-server",
            "--port",
            str(self.redis_port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
        ]
        command += [str(self.folder), "--requirepass", self.token.read_text(encoding="utf-8")]
        return subprocess.Popen(self.network.inside(0, command), stdout=subprocess.DEVNULL)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
        return (
            kept
            | QUIET
            | {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        )

    def start(self) -> None:
        self.start_node(0)
        self.start_node(1)
        self.await_nodes(2)

    def start_node(self, node: int) -> None:
        where = self.network.address(node)
        kept: dict[str, str] = {}
        ports = [
            "--dashboard-agent-listen-port",
            self.agents[2 * node],
            "--metrics-export-port",
            self.agents[2 * node + 1],
        ]
        if node == 0:
            role = [
                "--head",
                "--port",
                self.port,
                "--dashboard-port",
                self.dashboard,
                "--temp-dir",
                self.folder / "t",
            ]
            role += ["--dashboard-host", "127.0.0.1", "--ray-client-server-port", self.client]
            # Nodes on this machine see one another's processes, so a restarted head would mistake
            # its worker for itself.
            (self.folder / "t" / "ray_current_cluster").unlink(missing_ok=True)
            if self.redis:
                kept = {"RAY_REDIS_ADDRESS": f"127.0.0.1:{self.redis_port}"}
                role += ["--redis-password", self.token.read_text(encoding="utf-8")]
        else:
            role = ["--address", f"{self.network.address(0)}:{self.port}"]
        command = [
            "ray",
            "start",
            "--block",
            "--disable-usage-stats",
            "--node-ip-address",
            where,
            *role,
            *ports,
        ]
        command += ["--num-cpus", self.cpus, "--object-store-memory", 100_000_000]
        with (self.folder / f"node{node}.log").open("ab") as log:
            self.nodes[node] = subprocess.Popen(
                self.network.inside(node, [str(part) for part in command]),
                env=self.environment | kept, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def await_nodes(self, count: int) -> None:
        """Wait until the dashboard lists ``count`` live nodes."""
        ask = (
            "from ray.util.state import list_nodes; "
            "print(sum(it.state == 'ALIVE' for it in list_nodes()))"
        )
        deadline = time.monotonic() + LIMIT_S
        found = ""
        while time.monotonic() < deadline:
            said = self.run(
                [sys.executable, "-c", ask], RAY_API_SERVER_ADDRESS=self.url, check=False
            )
            found = said.stdout.strip() or said.stderr[-500:]
            if said.stdout.strip() == str(count):
                return
            time.sleep(0.5)
        logs = "".join(file.read_text() for file in sorted(self.folder.glob("node*.log")))
        raise RuntimeError(f"{found}\n{logs}")

    def run(
        self, command: list[str], check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the head."""
        return subprocess.run(
            self.network.inside(0, command),
            env=self.environment | variables, text=True, capture_output=True, timeout=LIMIT_S,
            check=check,
        )  # fmt: skip

    def kill_node(self, node: int) -> None:
        """Kill a node's processes by their ids, as a power cut would."""
        shell = psutil.Process(self.nodes.pop(node).pid)
        end([shell, *shell.children(recursive=True)])

    def close(self) -> list[psutil.Process]:
        """End both nodes; kill and return the processes that are still left in their networks."""
        for node in list(self.nodes):
            self.kill_node(node)
        if self.redis:
            self.redis.kill()
            self.redis.wait()
        deadline = time.monotonic() + 10  # watchers of other processes poll once a second
        while (left := self.network.inhabitants()) and time.monotonic() < deadline:
            time.sleep(0.2)
        end(left)
        self.network.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


@contextmanager
def ray_processes(redis: bool = False) -> Iterator[RayProcesses]:
    """A running head and worker; no process of theirs may be left at the end."""
    made = RayProcesses(redis=redis)
    try:
        made.start()
        yield made
    finally:
        left = made.close()
    assert left == [], [process.cmdline() for process in left]


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=LIMIT_S)


def free_ports(count: int) -> list[int]:
    """Return free ports of this machine."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
