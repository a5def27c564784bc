"""deploy/kubernetes: manifests that Kubernetes, KubeRay and our own code accept.

The manifests also fit together.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from orchestrator.cluster.nodes import ClusterNode
from orchestrator.job.yaml import load_job
from orchestrator.search.workers.placement import place
from orchestrator.serving.deploy.options import ServeOptions, options_from
from tests.deploy.manifests import (
    BASES,
    DEPLOY,
    KUBERNETES,
    OURS,
    OVERLAYS,
    ROOT,
    SCHEMAS,
    SIZES,
    Document,
    all_pods,
    built,
    built_text,
    check_ray_command,
    documents,
    found,
    labels,
    pinned,
    pods,
    quantity,
    version,
    whole,
    whole_pods,
    yaml_files,
)

NO_PROBES = {"dump", "logins", "submitter"}  # these containers end by themselves


def of_kind(folder: str, kind: str) -> list[Document]:
    return [document for document in built(folder) if document["kind"] == kind]


def ray_clusters(folder: str) -> list[Document]:
    """Return the cluster specs of a built folder's RayClusters, RayJobs and RayServices."""
    spots = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
    specs = []
    for document in built(folder):
        if document["kind"] in spots:
            spec = document["spec"]
            for key in spots[document["kind"]]:
                spec = spec[key]
            specs.append(spec)
    return specs


@pytest.mark.parametrize("file", yaml_files(), ids=lambda file: str(file.relative_to(DEPLOY)))
def test_every_file_is_yaml(file: Path) -> None:
    """Every YAML file parses and is not empty."""
    assert documents(file)


@pytest.mark.parametrize("folder", [*BASES, *OVERLAYS])
def test_kuberay_s_schemas_take_what_is_built(folder: str, tmp_path: Path) -> None:
    """Each base and overlay builds and fits the CRDs' schemas.

    The schemas would find a misspelt field.
    """
    checker = SCHEMAS / "check_manifest"
    if not checker.exists():
        pytest.skip("no ../shared/schemas")
    file = tmp_path / "built.yaml"
    file.write_text(built_text(folder))
    done = subprocess.run(
        [sys.executable, checker, file], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "broken.yaml"
    broken.write_text(file.read_text().replace("headGroupSpec:", "headGroup:"))
    if "headGroupSpec:" in file.read_text():
        assert (
            subprocess.run(
                [sys.executable, checker, broken], capture_output=True, timeout=60
            ).returncode
            == 1
        )


@lru_cache
def schemas() -> dict[str, Any]:
    """Return the schemas of pod templates, claims and network policy rules.

    They are parts of KubeRay's own schemas.
    """
    if not (SCHEMAS / "raycluster.json").exists():
        pytest.skip("no ../shared/schemas")
    cluster = json.loads((SCHEMAS / "raycluster.json").read_text())["properties"]["spec"][
        "properties"
    ]
    template = cluster["headGroupSpec"]["properties"]["template"]
    volume = template["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]
    return {
        "pod": template,
        "claim": volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"],
        "ingress": rules["ingressRules"],
        "egress": rules["egressRules"],
    }


def problems(part: str, value: Any) -> list[str]:
    found_ones = jsonschema.Draft202012Validator(schemas()[part]).iter_errors(value)
    return [f"{'/'.join(map(str, it.path))}: {it.message[:200]}" for it in found_ones]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_kubernetes_takes_pods_claims_and_policies(folder: str) -> None:
    """Pods, volume claims and network policies fit KubeRay's schemas of them.

    Pods outside of Ray are included.
    """
    for where, pod in all_pods(folder):
        assert not problems("pod", pod), where
    claims = [it["spec"] for it in of_kind(folder, "PersistentVolumeClaim")]
    claims += [
        it["spec"] for templates in found(built(folder), "volumeClaimTemplates") for it in templates
    ]
    for claim in claims:
        assert not problems("claim", claim)
    for policy in of_kind(folder, "NetworkPolicy"):
        for direction in ("ingress", "egress"):
            assert not problems(direction, policy["spec"].get(direction, [])), policy["metadata"][
                "name"
            ]
    assert problems("pod", {"spec": {"containers": [{"name": "x", "imgae": "y"}]}})


@pytest.mark.parametrize("folder", OVERLAYS)
def test_parts_of_a_workload_fit_together(folder: str) -> None:
    """Workloads select their own pods, and services some pod.

    Mounts, probes and services name what exists.
    """
    every = [pod for _, pod in all_pods(folder)]
    for document in built(folder):
        spec = document.get("spec", {})
        if document["kind"] in ("Deployment", "StatefulSet"):
            assert spec["selector"]["matchLabels"].items() <= labels(spec["template"]).items()
        if document["kind"] == "Service":
            chosen = [pod for pod in every if spec["selector"].items() <= labels(pod).items()]
            opened = {
                port[key]
                for pod in chosen
                for c in pod["spec"]["containers"]
                for port in c["ports"]
                for key in ("name", "containerPort")
            }
            assert (
                chosen
                and {port.get("targetPort", port["port"]) for port in spec["ports"]} <= opened
            )
        templates = {it["metadata"]["name"] for it in spec.get("volumeClaimTemplates", [])}
        for where, pod in pods(document):
            volumes = {it["name"] for it in pod["spec"].get("volumes", [])} | templates
            for container in pod["spec"]["containers"]:
                assert {it["name"] for it in container.get("volumeMounts", [])} <= volumes, where
                named = {it["name"] for it in container.get("ports", [])}
                assert {it["port"] for it in found(container, "httpGet")} <= named, where


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_are_confined(folder: str) -> None:
    """Pods run without root and extra rights, with requests, limits and probes.

    Only Ray heads and Prometheus, which call the API server, get its token.
    """
    seen = all_pods(folder)
    assert seen
    for where, pod in seen:
        spec = pod["spec"]
        assert (
            spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        ), where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        asks = "headGroupSpec" in where or spec.get("serviceAccountName") == "prometheus"
        assert asks or spec["automountServiceAccountToken"] is False, where
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            what = f"{where} {container['name']}"
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False and rights["capabilities"] == {
                "drop": ["ALL"]
            }, what
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][kind].keys(), what
            for resource, asked in container["resources"]["requests"].items():
                assert quantity(asked) <= quantity(container["resources"]["limits"][resource]), what
            if container["name"] not in NO_PROBES:
                assert "livenessProbe" in container, what


@pytest.mark.parametrize("folder", [*BASES, *OVERLAYS])
def test_images_have_one_version_each(folder: str) -> None:
    """Each image has the same version everywhere, and never ``latest``.

    Our images have the project's version, and Ray the pinned one.
    """
    tags: dict[str, set[str]] = {}
    for image in found(built(folder), "image"):
        name, _, tag = image.partition(":")
        assert tag and tag != "latest", image
        tags.setdefault(name, set()).add(tag)
    for name, used in tags.items():
        assert len(used) == 1, f"{name}: {used}"
        if name in OURS:
            assert used.pop().removesuffix("-cuda") == version()
    assert {spec["rayVersion"] for spec in ray_clusters(folder)} <= {pinned()["ray"]}


@pytest.mark.parametrize("size", SIZES)
def test_secrets_come_by_reference_only(size: str) -> None:
    """No manifest holds a Secret, and every password, key or token refers to one.

    deploy/kubernetes/secrets or a command of the docs makes these Secrets.
    """
    made = {
        it["metadata"]["name"]: set(it["stringData"])
        for it in documents(KUBERNETES / "secrets.example.yaml")
    }
    made |= {"orchestrator-api-keys": {"keys.json"}, "orchestrator-metrics-key": {"metrics"}}
    for folder in (it for it in OVERLAYS if f"/{size}" in it):
        assert not of_kind(folder, "Secret")
        for reference in found(built(folder), "secretKeyRef"):
            assert reference["key"] in made[reference["name"]], reference
        for name in [it["secretName"] for it in found(built(folder), "secret")]:
            assert name in made
        for variables in found(built(folder), "env"):
            for variable in variables:
                if re.search(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY|LOGIN", variable["name"]):
                    assert "secretKeyRef" in variable.get("valueFrom", {}), variable
        for cluster in ray_clusters(folder):
            assert cluster["authOptions"]["mode"] == "token"
            assert "auth_token" in made[cluster["authOptions"]["secretName"]]


def test_the_example_is_what_its_command_prints() -> None:
    """The example holds only placeholders; the command itself makes new values each time."""
    script = KUBERNETES / "secrets"
    shown = subprocess.run([script, "--example"], capture_output=True, text=True, check=True).stdout
    assert shown == (KUBERNETES / "secrets.example.yaml").read_text()
    values = [
        value for document in yaml.safe_load_all(shown) for value in document["stringData"].values()
    ]
    assert all(value.startswith("REPLACE-") or value in ("tuning", "serving") for value in values)
    first, second = (
        list(
            yaml.safe_load_all(
                subprocess.run(
                    [script, "a-team"], capture_output=True, text=True, check=True
                ).stdout
            )
        )
        for _ in range(2)
    )
    assert {it["metadata"]["namespace"] for it in first} == {"a-team"}
    passwords = [
        it["stringData"] for it in first if it["metadata"]["name"] == "orchestrator-postgres"
    ]
    assert passwords != [
        it["stringData"] for it in second if it["metadata"]["name"] == "orchestrator-postgres"
    ]
    assert re.fullmatch("[0-9a-f]{48}", passwords[0]["password"])
    named = {it["metadata"]["name"]: it["stringData"] for it in first}
    assert len({secret["password"] for secret in named.values() if "password" in secret}) == 4, (
        "each its own"
    )


def test_the_script_for_secrets_explains_itself() -> None:
    """Without an argument, or with a wrong one, the script prints its usage and no secret."""
    for arguments in ([], ["--wrong"], ["--compose"]):
        done = subprocess.run([KUBERNETES / "secrets", *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and "--example" in done.stderr and not done.stdout


@pytest.mark.parametrize("size", SIZES)
def test_what_pods_name_is_there(size: str) -> None:
    """The claims, settings, priorities and services that pods refer to exist."""
    everything = whole(size)

    def names(kind: str) -> set[str]:
        return {document["metadata"]["name"] for document in everything if document["kind"] == kind}

    claims, settings = names("PersistentVolumeClaim"), names("ConfigMap")
    assert {it["claimName"] for it in found(everything, "persistentVolumeClaim")} <= claims
    named = [*found(everything, "configMap"), *found(everything, "configMapRef")]
    assert named and {it["name"] for it in named} <= settings
    assert set(found(everything, "priorityClassName")) == names("PriorityClass")
    (address,) = {it["redisAddress"] for it in found(everything, "gcsFaultToleranceOptions")}
    assert address.partition(":")[0] in names("Service")
    (jobs_names,) = [
        it["command"][2:]
        for it in found(everything, "containers")
        for it in it
        if it["name"] == "logins"
    ]
    assert {f"orchestrator-{name}" for name in jobs_names} == {
        it["name"] for it in found(everything, "secretKeyRef") if it["key"] == "username"
    }
    (tracking,) = set(found(everything, "MLFLOW_TRACKING_URI"))
    assert tracking == "http://mlflow:5000" and {"mlflow", "postgres"} <= names("Service")
    (uri,) = [
        it["value"]
        for env in found(everything, "env")
        for it in env
        if it["name"] == "POSTGRES_URI"
    ]
    assert "@postgres/" in uri


@pytest.mark.parametrize("size", SIZES)
def test_names_do_not_meet(size: str) -> None:
    """Names of clusters, jobs and services differ, and no object comes twice.

    KubeRay names services after its objects, whatever their kind, so a cluster and a service must
    not share a name. No two overlays of one size bring the same object.
    """
    objects = [(it["kind"], it["metadata"]["name"]) for it in whole(size)]
    assert len(objects) == len(set(objects))
    of_ray = [name for kind, name in objects if kind in ("RayCluster", "RayJob", "RayService")]
    assert len(of_ray) == len(set(of_ray)) == 3
    made = {f"{name}-{suffix}" for name in of_ray for suffix in ("head-svc", "serve-svc")}
    asked = set(
        re.findall(
            r"service/([\w-]+-svc)", "".join(it.read_text() for it in (ROOT / "docs").rglob("*.md"))
        )
    )
    assert asked and asked <= made


@pytest.mark.parametrize("size", SIZES)
def test_network_policies_are_about_pods_that_there_are(size: str) -> None:
    """Pods talk only where a policy allows it, and every pod has a policy.

    Each policy selects existing pods and opens ports that they have.
    """
    policies = {
        it["metadata"]["name"]: it["spec"] for it in whole(size) if it["kind"] == "NetworkPolicy"
    }
    assert policies["nobody"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    every = [pod for _, pod in whole_pods(size)]
    chosen: set[int] = set()
    for name, policy in policies.items():
        wanted = policy["podSelector"].get("matchLabels", {})
        matching = [pod for pod in every if wanted.items() <= labels(pod).items()]
        if not wanted:
            continue
        assert matching, name
        chosen |= {id(pod) for pod in matching}
        for peers in found([policy.get("ingress", []), policy.get("egress", [])], "podSelector"):
            if other := peers.get("matchLabels"):
                assert any(other.items() <= labels(pod).items() for pod in every), (name, other)
    assert len(chosen) == len(every)
    ray = policies["ray"]["ingress"]
    opened = {port["port"] for rule in ray[1:] for port in rule["ports"]}
    assert opened <= {8000, 8080, 8265, 44217, 44227, 52365}, (
        "Ray's own ports are for Ray's own pods"
    )


@pytest.mark.parametrize("folder", ["overlays/small/serving", "overlays/large/serving", "serving"])
def test_the_service_s_config_is_one_that_serve_and_we_accept(folder: str) -> None:
    """Serve's schema and our options accept the config.

    It equals deploy/serve.yaml except for what a cluster needs.
    """
    (service,) = of_kind(folder, "RayService")
    document = yaml.safe_load(service["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(document)
    assert (schema.http_options.host, schema.http_options.port) == ("0.0.0.0", 8000)
    (application,), ours = (
        document["applications"],
        yaml.safe_load((DEPLOY / "serve.yaml").read_text()),
    )
    (own,) = ours["applications"]
    options = options_from(application["args"])
    options.check()
    sizes = {"replicas", "max_replicas", "cpus", "gpus", "retry_dead"}
    assert {k: v for k, v in application["args"].items() if k not in sizes} == {
        k: v for k, v in own["args"].items() if k not in sizes
    }
    for key in ("name", "route_prefix", "import_path", "runtime_env"):
        assert application[key] == own[key]
    assert (
        document["logging_config"] == ours["logging_config"]
        and document["proxy_location"] == ours["proxy_location"]
    )
    fits_its_pods(options, service["spec"]["rayClusterConfig"])


def fits_its_pods(options: ServeOptions, cluster: Document) -> None:
    """Check that a replica fills a worker pod and that each replica can have a pod."""
    (group,) = cluster["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = float(limits.get("nvidia.com/gpu", 0))
    assert options.cores <= quantity(limits["cpu"]) < 2 * options.cores
    assert (options.gpus or 0) == gpus
    assert options.max_replicas is not None and options.max_replicas <= group["maxReplicas"]
    assert options.replicas <= group["minReplicas"]
    assert options.drain_seconds < group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"


def test_upgrades_move_requests_step_by_step_where_there_is_room_for_it() -> None:
    """The large overlay upgrades by increments through a gateway, the small one as a whole."""
    (large,) = of_kind("overlays/large/serving", "RayService")
    assert large["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    assert large["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]["gatewayClassName"]
    (small,) = of_kind("overlays/small/serving", "RayService")
    assert small["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


@pytest.mark.parametrize("folder", ["tuning", "overlays/small/tuning", "overlays/large/tuning"])
def test_the_job_fits_on_its_cluster(folder: str) -> None:
    """The job spec is valid, and its workers fit on the pods that exist at the start."""
    (settings,) = [
        it for it in of_kind(folder, "ConfigMap") if it["metadata"]["name"] == "orchestrator-job"
    ]
    (ray_job,) = of_kind(folder, "RayJob")
    file = KUBERNETES / folder / "job.yaml"
    assert settings["data"] == {"job.yaml": file.read_text()}
    job = load_job(file)
    assert job.name == ray_job["metadata"]["name"]
    cluster = ray_job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"], (
        "a search uses no node that comes later"
    )
    assert not cluster.get("enableInTreeAutoscaling")
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    pod = ClusterNode(quantity(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0)))
    placement = place(
        job.resources, [ClusterNode(0.0), *[pod] * group["replicas"]], job.search.trials
    )
    assert placement.workers == group["replicas"] and placement.gpus == pod.gpus
    mounted = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    (at,) = [it["mountPath"] for it in mounted if it["name"] == "job"]
    assert ray_job["spec"]["entrypoint"] == f"run-or-resume {at}/job.yaml"


@pytest.mark.parametrize("folder", OVERLAYS)
def test_clusters_keep_their_heads_free(folder: str) -> None:
    """The head offers no CPUs and no GPU.

    Its state is kept in Redis, except for a job's cluster: a job is started again.
    """
    for cluster in ray_clusters(folder):
        head = cluster["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert (
            "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
        )
        lasts = "gcsFaultToleranceOptions" in cluster
        assert lasts != folder.endswith("tuning")
        environments = [
            {it["name"] for it in pod["spec"]["containers"][0]["env"]}
            for pod in (
                head["template"],
                *(group["template"] for group in cluster["workerGroupSpecs"]),
            )
        ]
        assert all(
            env >= {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} for env in environments
        )


@pytest.mark.parametrize("folder", ["base", "tuning", "serving"])
def test_ray_takes_its_parameters(folder: str) -> None:
    """Ray knows the start commands that KubeRay builds, and the pods' preStop commands."""
    for cluster in ray_clusters(folder):
        head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        for kind, group in [
            ("--head", head),
            *(("--address=head:6379", group) for group in workers),
        ]:
            given = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
            check_ray_command(["ray", "start", kind, "--block", *given])
        for ended in found(cluster, "preStop"):
            check_ray_command(ended["exec"]["command"])
    with pytest.raises(Exception, match="no-such"):
        check_ray_command(["ray", "start", "--no-such=1"])


def test_nothing_in_deploy_looks_like_a_secret() -> None:
    """There is no long random text, no known shape of a key, no password in an address."""
    shapes: list[str] = [
        r"\b[0-9a-f]{32,}\b", r"AKIA[0-9A-Z]{16}", r"\bsk-[\w-]{20,}", r"\bhf_\w{20,}",
        r"BEGIN [A-Z ]*PRIVATE KEY", r"://[^/\s:@]+:(?!\$)[^/\s@]+@",
        r"(?i)password:[ \t]*['\"]?(?!\$|\{|REPLACE)[\w-]{6,}",
    ]  # fmt: skip
    for file in sorted(DEPLOY.rglob("*")):
        if not file.is_file() or "secrets" in file.parent.parts or file.suffix == ".py":
            continue
        text = file.read_text()
        for shape in shapes:
            assert not (hit := re.search(shape, text)) or "user:password@" in hit[0], (
                f"{file}: {hit}"
            )
