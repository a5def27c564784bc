"""Secrets in addresses are masked when shown and never sent where others can read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_jobs import Command, write_job

from orchestrator.cluster.session import check_answers, no_cluster
from orchestrator.cluster.submit.environment import forwarded
from orchestrator.cluster.submit.job_server import Cluster, checked_address
from orchestrator.errors import BadInput, Unreachable
from orchestrator.registry import Registry
from orchestrator.serving.client import ask
from orchestrator.utils.object_store import check_address
from orchestrator.utils.text import hide_secrets, holds_login, mask_secrets

SECRET = "s3cr3t"
WITH_SECRETS = [
    f"postgresql://host/mlflow?user=ann&password={SECRET}",
    f"postgresql://host/mlflow?password={SECRET}&user=ann",
    f"postgresql://host/mlflow?sslmode=require&sslpassword={SECRET}",
    f"postgresql://host/mlflow?pass%77ord={SECRET}",
    f"postgresql+psycopg://ann:{SECRET}@host/mlflow",
    f"postgresql://ann:{SECRET}/x@host/mlflow",
    f"postgresql://ann:12/{SECRET}@host/mlflow",
    f"mysql+pymysql://host/mlflow?passwd={SECRET}",
    f"mysql://host/mlflow?PWD={SECRET}",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC+18%7D%3BUID%3Dann%3BPWD%3D{SECRET}",
    f"mssql://host/mlflow?driver=x;password={SECRET}",
    f"https://ann:{SECRET}@mlflow",
    f"https://ann:{SECRET}/x@mlflow",
    f"https://ann:x@{SECRET}@mlflow",
    f"https://{SECRET}@mlflow",
    f"https://mlflow/?token={SECRET}",
    f"https://mlflow/?x=1&access_token={SECRET}",
    f"https://mlflow/#api_key={SECRET}",
    f"https://mlflow/?apiKey={SECRET}",
    f"https://mlflow/?key={SECRET}",
    f"https://mlflow/?client_secret={SECRET}",
    (
        f"https://store/file?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}"
        f"&X-Amz-Security-Token={SECRET}"
    ),
    f"https://store/file?sv=2024&sig={SECRET}",
    f"s3://bucket/folder?secret_key={SECRET}",
    f"s3://bucket/folder?endpoint_override=http%3A%2F%2Fann%3A{SECRET}%40minio%3A9000",
]
WITHOUT_SECRETS = [
    "http://127.0.0.1:5000",
    "http://127.0.0.1:5000/a@b",
    "http://[::1]:5000/a@b",
    "sqlite:////home/ann/mlflow.db?timeout=3",
    (
        "postgresql://host:5432/mlflow?sslmode=verify-full&sslkey=/keys/client.key"
        "&sslrootcert=/keys/root.pem"
    ),
    "mysql://host/mlflow?ssl_key=/keys/client.key",
    "s3://bucket/folder?region=eu-west-1&endpoint_override=http://minio:9000",
    "https://hub/models?monkey=1&tokens=5&keys=a",
]


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_a_secret_in_an_address_is_hidden(url: str) -> None:
    """Secrets before the host and in the query are masked; masking twice changes nothing."""
    masked = mask_secrets(f"no answer from {url} (timeout)")
    assert SECRET not in masked and "***" in masked
    assert masked.startswith("no answer from ") and masked.endswith(" (timeout)")
    assert mask_secrets(masked) == masked
    assert holds_login(url)


@pytest.mark.parametrize("url", WITHOUT_SECRETS)
def test_an_address_without_secrets_stays_as_it_is(url: str) -> None:
    """Ports, paths and parameters that only look like secrets are shown."""
    assert mask_secrets(url) == url
    assert not holds_login(url)


def test_a_connection_string_loses_its_password() -> None:
    """Drivers quote their own format, not a URL, in errors; its password is masked too."""
    masked = mask_secrets(f"connection failed: host=db user=ann password={SECRET} dbname=mlflow")
    assert masked == "connection failed: host=db user=ann password=*** dbname=mlflow"


@pytest.mark.parametrize(
    "url", ["postgresql://ann@host/mlflow", "postgresql://host/mlflow?user=ann"]
)
def test_a_user_name_alone_is_a_login(url: str) -> None:
    """A user name is not secret, but belongs to the person who submits."""
    assert holds_login(url)


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "HF_ENDPOINT"])
@pytest.mark.parametrize("url", WITH_SECRETS)
def test_an_address_with_a_login_is_not_sent_to_the_cluster(name: str, url: str) -> None:
    """Everybody who lists jobs could read it, so it is passed by variable name and never shown."""
    with pytest.raises(BadInput, match=f"{name} holds a login") as refused:
        forwarded({name: url})
    assert SECRET not in str(refused.value)
    assert SECRET not in str(forwarded({name: url}, [name]).shown())


@pytest.mark.parametrize("url", WITHOUT_SECRETS)
def test_an_address_without_a_login_is_sent(url: str) -> None:
    """A port or a certificate's path is no reason to refuse."""
    assert forwarded({"MLFLOW_TRACKING_URI": url}).public == {"MLFLOW_TRACKING_URI": url}


def test_a_dry_run_refuses_a_password_in_the_query(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It exits with 2 before anything is sent, and does not repeat the password."""
    job = write_job(tmp_path)
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", f"postgresql://host/mlflow?user=ann&password={SECRET}"
    )
    said = command("submit", job, "--dry-run")
    assert said.code == 2 and "MLFLOW_TRACKING_URI holds a login" in said.err
    said_by_name = command("submit", job, "--dry-run", "--env", "MLFLOW_TRACKING_URI")
    assert said_by_name.code == 0, said_by_name.err
    assert SECRET not in said.out + said.err + said_by_name.out + said_by_name.err


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/x?secret_key=", "s3://bucket/x?access_key=k&endpoint_override=a&secret_key="],
)
def test_a_folder_for_searches_holds_no_key(url: str) -> None:
    """A key is refused in the query as well as before the bucket."""
    with pytest.raises(BadInput, match="--home holds a key") as refused:
        check_address(url + SECRET, "--home")
    assert SECRET not in str(refused.value)


def test_the_address_of_a_dashboard_is_shown_without_its_login() -> None:
    """The login is hidden in documents, hints and refusals, with and without a scheme."""
    assert SECRET not in Cluster(f"http://ann:{SECRET}@head:8265").shown
    assert SECRET not in Cluster(f"http://head:8265/?token={SECRET}").shown
    for address in (
        f"ann:{SECRET}@head:8265",
        f"ray://ann:{SECRET}@head:10001",
        f"head?token={SECRET}",
    ):
        with pytest.raises(BadInput) as refused:
            checked_address(address)
        assert SECRET not in str(refused.value)


def test_a_cluster_that_does_not_answer_is_named_without_its_login() -> None:
    """The login in `run --address` and RAY_ADDRESS is hidden too."""
    with pytest.raises(BadInput) as refused:
        check_answers(f"https://ann:{SECRET}@head:8265")
    error = no_cluster(f"ray://ann:{SECRET}@head:10001", f"can't resolve ray://ann:{SECRET}@head")
    assert SECRET not in f"{refused.value} {error}"


def test_a_server_that_does_not_answer_is_named_without_its_login() -> None:
    """The login of a proxy in `query --url` is hidden."""
    with pytest.raises(Unreachable) as failed:
        ask(f"http://ann:{SECRET}@127.0.0.1:9", "spam", "text")
    assert SECRET not in str(failed.value) and "127.0.0.1:9" in str(failed.value)


@pytest.mark.parametrize(
    "uri",
    [
        f"http://ann:{SECRET}/x@host",
        f"gopher://ann:{SECRET}@host",
        f"sqlite://host?password={SECRET}",
        f"./folder?password={SECRET}",
    ],
)
def test_a_refused_tracking_uri_is_shown_without_its_password(uri: str) -> None:
    """The password is hidden whatever the reason for the refusal."""
    with pytest.raises(BadInput) as refused:
        Registry(uri)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://{place}"
        for place in (f"ann:{SECRET}@host/x", f"host/x?user=ann&password={SECRET}")
    ]
    + [f"https://{SECRET}@mlflow", f"https://mlflow?token={SECRET}"],
)
def test_what_a_search_keeps_of_the_tracking_uri_has_no_secret(url: str) -> None:
    """JSON documents, the report page and search.json use this masked address."""
    assert SECRET not in Registry(url).display_uri


def test_an_unforeseen_error_is_shown_without_secrets(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library's error may repeat the address that it was given."""

    def fail(self: Registry) -> None:
        raise RuntimeError(f"can't parse postgresql://host/?password={SECRET}")

    monkeypatch.setattr(Registry, "check", fail)
    said = command("models", "spam")
    assert said.code == 1 and "unforeseen" in said.err and SECRET not in said.err


def test_an_address_that_an_earlier_release_kept_is_still_the_same() -> None:
    """Earlier releases kept the user name; `resume` masks the address before comparing."""
    now = Registry(f"postgresql://ann:{SECRET}@host/mlflow").display_uri
    assert mask_secrets("postgresql://ann:***@host/mlflow") == now == "postgresql://***@host/mlflow"


def test_texts_that_are_published_hold_no_known_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of variables with secret names are hidden; short ones and other variables are not."""
    monkeypatch.setenv("ANY_TOKEN", "abcdefgh12")
    monkeypatch.setenv("OTHER_PASSWORD", "spam")
    monkeypatch.setenv("SOME_FOLDER", "is-this-spam")
    text = "abcdefgh12 is-this-spam hf_0123456789abcdefXYZ https://u:p@h/"
    assert hide_secrets(text) == "*** is-this-spam *** https://***@h/"
