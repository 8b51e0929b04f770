# SPDX-License-Identifier: Apache-2.0
"""The chart: it lints, renders with every toggle, refuses bad values, and asks for little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[3]
CHART = REPO / "charts" / "bpf-dataplane"
DIGEST = "sha256:" + "0" * 64

TOGGLES = [
    "hooks.applyCRDs=false",
    "hooks.createDefault=false",
    "hooks.restore=false",
    "hooks.restoreTimeoutSeconds=600",
    "admissionPolicy.create=false",
    'apiServer={"host": "192.0.2.1", "port": 6443}',
    'apiServer={"host": "2001:db8::1", "port": 443}',
    'image.tag=""',
    f'image.digest="{DIGEST}"',
    'image.pullPolicy="Always"',
    'imagePullSecrets=[{"name": "registry"}]',
    "defaultConfig={}",
    'defaultConfig={"services": {"externalServiceMode": "DSR", "dsrOptOutCIDRs": ["192.0.2.0/24"]}}',
    'operator.logLevel="Debug"',
    'operator.resources={"limits": {"memory": "512Mi"}}',
    "operator.tolerations=[]",
    "operator.nodeSelector={}",
    'operator.affinity={"nodeAffinity": {}}',
    'operator.podAnnotations={"example.com/note": "yes"}',
]  # fmt: skip

REFUSED = [
    ('image.repository=""', "image/repository"),
    ('image.digest="sha256:short"', "image/digest"),
    ('image.pullPolicy="Sometimes"', "image/pullPolicy"),
    ('image.repo="x"', "'repo'"),
    ("apiServer.port=70000", "apiServer/port"),
    ('apiServer.host="https://api"', "apiServer/host"),
    ('operator.logLevel="Loud"', "operator/logLevel"),
    ('defaultConfig={"kubeProxyManagment": "Enabled"}', "'kubeProxyManagment'"),
    ('defaultConfig.kubeProxyManagement="Yes"', "defaultConfig/kubeProxyManagement"),
    ('hooks.restore="no"', "hooks/restore"),
    ("hooks.restoreTimeoutSeconds=1", "hooks/restoreTimeoutSeconds"),
    ("typo=true", "'typo'"),
]  # fmt: skip


def by_name(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == kind}


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod specs of all workloads by the workload's name."""
    return {
        o["metadata"]["name"]: o["spec"]["template"]["spec"]
        for o in objects
        if o["kind"] in ("Deployment", "Job")
    }


def test_lint(helm: Any) -> None:
    result = helm.run("lint", "--strict", "--kube-version", "1.36.0", str(CHART))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("toggle", TOGGLES)
def test_every_toggle_renders(helm: Any, toggle: str) -> None:
    assert by_name(helm.objects(toggle), "Deployment")


def test_all_toggles_render_together(helm: Any) -> None:
    assert by_name(helm.objects(*TOGGLES), "Deployment")


def test_every_value_is_toggled() -> None:
    """A value that is added to the chart is added to TOGGLES."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    leaves = {
        f"{section}.{key}"
        if isinstance(values[section], dict) and section not in whole
        else section
        for whole in [("defaultConfig", "apiServer")]
        for section in values
        for key in (values[section] if isinstance(values[section], dict) else [""])
    }
    toggled = {toggle.split("=")[0] for toggle in TOGGLES}
    assert leaves - toggled == {"image.repository", "operator.priorityClassName"}


@pytest.mark.parametrize(("value", "named"), REFUSED)
def test_bad_values_are_refused_by_name(helm: Any, value: str, named: str) -> None:
    result = helm.template(value)
    assert result.returncode != 0
    assert named in result.stderr, result.stderr


def test_an_older_kubernetes_is_refused(helm: Any) -> None:
    result = helm.run("template", "x", str(CHART), "--kube-version", "1.29.0")
    assert "requires kubeVersion" in result.stderr


def test_schema_knows_the_fields_of_the_spec() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    crd = yaml.safe_load((REPO / "crds" / "bpfdataplanes.yaml").read_text())
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert schema["properties"]["defaultConfig"]["properties"].keys() == spec["properties"].keys()


def test_digest_wins_over_tag(helm: Any) -> None:
    objects = helm.objects(f'image.digest="{DIGEST}"', 'image.tag="v1"')
    images = {
        container["image"] for pod in pods(objects).values() for container in pod["containers"]
    }
    assert images == {f"localhost/bpf-dataplane@{DIGEST}"}
    environment = {
        e["name"]: e.get("value") for e in pods(objects)["bpfdp-operator"]["containers"][0]["env"]
    }
    assert environment["BPFDP_AGENT_IMAGE"] == f"localhost/bpf-dataplane@{DIGEST}"


def test_pods_have_no_privilege(helm: Any) -> None:
    rendered = pods(helm.objects())
    assert rendered.keys() == {
        "bpfdp-operator",
        "bpfdp-hook-crds",
        "bpfdp-hook-default",
        "bpfdp-hook-restore",
    }
    for pod in rendered.values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_probes_stay_on_localhost(helm: Any) -> None:
    (container,) = pods(helm.objects())["bpfdp-operator"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {
            "host": "127.0.0.1",
            "port": 9098,
            "path": "/healthz",
        }


def test_one_operator_at_a_time(helm: Any) -> None:
    spec = by_name(helm.objects(), "Deployment")["bpfdp-operator"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    pod = spec["template"]["spec"]
    assert pod["priorityClassName"] == "system-cluster-critical"
    assert pod["tolerations"] == [{"operator": "Exists"}]


def test_a_known_api_server_leads_around_its_service(helm: Any) -> None:
    objects = helm.objects('apiServer={"host": "192.0.2.1", "port": 6443}')
    for name, pod in pods(objects).items():
        environment = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
        assert environment["KUBERNETES_SERVICE_HOST"] == "192.0.2.1", name
        assert environment["KUBERNETES_SERVICE_PORT"] == "6443", name
    data = by_name(objects, "ConfigMap")["kubernetes-services-endpoint"]["data"]
    assert data == {"KUBERNETES_SERVICE_HOST": "192.0.2.1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert not by_name(helm.objects(), "ConfigMap")


def test_hooks_run_when_they_must(helm: Any) -> None:
    jobs = by_name(helm.objects(), "Job")
    moments = {name: job["metadata"]["annotations"]["helm.sh/hook"] for name, job in jobs.items()}
    assert moments == {
        "bpfdp-hook-crds": "pre-install,pre-upgrade",
        "bpfdp-hook-default": "post-install",
        "bpfdp-hook-restore": "pre-delete",
    }
    for job in jobs.values():
        assert job["spec"]["activeDeadlineSeconds"] < 300
        policy = job["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
        assert policy == "before-hook-creation,hook-succeeded"


def test_the_restore_hook_knows_its_deadline(helm: Any) -> None:
    for sets, seconds in (((), 220), (("hooks.restoreTimeoutSeconds=600",), 600)):
        spec = by_name(helm.objects(*sets), "Job")["bpfdp-hook-restore"]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        assert spec["activeDeadlineSeconds"] == seconds
        assert {"name": "BPFDP_RESTORE_SECONDS", "value": str(seconds)} in container["env"]


def test_default_config_reaches_the_hook(helm: Any) -> None:
    def spec(*sets: str) -> Any:
        (container,) = pods(helm.objects(*sets))["bpfdp-hook-default"]["containers"]
        return json.loads(
            next(e["value"] for e in container["env"] if e["name"] == "BPFDP_DEFAULT_SPEC")
        )

    assert spec() == {"kubeProxyManagement": "Enabled"}
    assert spec('defaultConfig.services={"externalServiceMode": "DSR"}') == {
        "kubeProxyManagement": "Enabled",
        "services": {"externalServiceMode": "DSR"},
    }


def test_roles_ask_for_no_secrets_and_no_wildcards(helm: Any) -> None:
    roles = [o for o in helm.objects() if o["kind"] in ("Role", "ClusterRole")]
    assert len(roles) == 8
    for role in roles:
        for rule in role["rules"]:
            asked = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in asked, role["metadata"]["name"]
            assert "secrets" not in asked, role["metadata"]["name"]


def test_writes_outside_our_kinds_are_named(helm: Any) -> None:
    """Whoever may write to foreign objects, may do so to the listed ones alone."""
    allowed = {
        ("bpfdp-operator", "nodes", ""),
        ("bpfdp-operator", "events", ""),
        ("bpfdp-operator", "daemonsets", ""),
        ("bpfdp-operator", "daemonsets", "bpfdp-agent"),
        ("bpfdp-operator-kube-proxy", "daemonsets", "kube-proxy"),
        ("bpfdp-agent", "events", ""),
        ("bpfdp-hook-crds", "customresourcedefinitions", ""),
        (
            "bpfdp-hook-crds",
            "customresourcedefinitions",
            "bpfdataplanes.bpfdataplane.io,bpfnodes.bpfdataplane.io",
        ),
    }
    found = {
        (role["metadata"]["name"], resource, ",".join(rule.get("resourceNames", [])))
        for role in helm.objects()
        if role["kind"] in ("Role", "ClusterRole")
        for rule in role["rules"]
        if {"create", "update", "patch", "delete"} & set(rule["verbs"])
        and rule["apiGroups"] != ["bpfdataplane.io"]
        for resource in rule["resources"]
    }
    assert found == allowed


def test_everything_lands_in_the_release_namespace(helm: Any) -> None:
    objects = helm.objects(namespace="elsewhere")
    assert "bpf-dataplane" not in {o["metadata"].get("namespace") for o in objects}
    subjects = [s for o in objects for s in o.get("subjects", [])]
    assert {s["namespace"] for s in subjects} == {"elsewhere"}
    (policy,) = by_name(objects, "ValidatingAdmissionPolicy").values()
    assert (
        "system:serviceaccount:elsewhere:bpfdp-agent"
        in policy["spec"]["matchConditions"][0]["expression"]
    )


def test_crds_stay_after_uninstall(helm: Any) -> None:
    """They are in crds/, which Helm installs and never removes, and not among the templates."""
    assert not by_name(helm.objects(), "CustomResourceDefinition")
