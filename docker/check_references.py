"""What schemas cannot see: whether the names by which these files know each other are there. check.sh runs it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
# Not made here: README.md says how, or whose they are.
OTHERS_SECRETS = {"reknit-etcd": {"ca.pem", "client.pem", "client.key"}}
OTHERS_LABELS = [{"app.kubernetes.io/name": "etcd"}]

wrong: list[str] = []


def need(holds: object, otherwise: str) -> None:
    if not holds:
        wrong.append(otherwise)


def compose() -> dict:
    return yaml.safe_load((HERE / "compose.yaml").read_text())


def manifests() -> list[dict]:
    kustomization = yaml.safe_load((HERE / "kubernetes/kustomization.yaml").read_text())
    listed = set(kustomization["resources"])
    there = {path.name for path in (HERE / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    need(listed == there, f"kustomization.yaml lists {sorted(listed)}, and there are {sorted(there)}")
    texts = [(HERE / "kubernetes" / name).read_text() for name in sorted(listed & there)]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def words(command: object) -> list[str]:
    return shlex.split(command) if isinstance(command, str) else [str(word) for word in command or []]


def value(argv: list[str], flag: str) -> str | None:
    for at, word in enumerate(argv):
        if word == flag and at + 1 < len(argv):
            return argv[at + 1]
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def hosts(text: str) -> set[str]:
    """Those in URLs and in lists of HOST:PORT."""
    return set(re.findall(r"([a-z][a-z0-9.-]*):\d+", text))


def files_are_made(who: str, text: str, made: Path, mounts: dict[str, set[str]]) -> None:
    """`mounts`: the directories that it sees, and what is in them."""
    for directory, name in re.findall(r"(/secrets/[a-z]+)/([a-z.-]+)", text):
        need(name in mounts.get(directory, set()), f"{who} reads {directory}/{name}, which is not there")


def inside(made: Path, what: str) -> set[str]:
    return {path.name for path in (made / what).glob("*")}


def check_compose(made: Path) -> None:
    file = compose()
    services, used_volumes, used_networks = file["services"], set(), set()
    etcds = {name for name in services if name.startswith("etcd-")}
    coordinators = {name for name in services if name.startswith("coordinator-")}
    for name, service in services.items():
        argv = words(service.get("entrypoint")) + words(service.get("command"))
        environment = {key: str(text) for key, text in service.get("environment", {}).items()}
        everything = " ".join(argv + list(environment.values()))
        for other in service.get("depends_on", {}):
            need(other in services, f"{name} depends on {other}, which is no service")
        volumes = [volume.split(":") for volume in service.get("volumes", [])]
        used_volumes |= {volume[0] for volume in volumes}
        used_networks |= set(service.get("networks", []))
        for host in hosts(everything) - {"localhost"}:
            need(host in services, f"{name} speaks of {host}, which is no service")
        advertised = value(argv, "--advertise")
        need(advertised is None or hosts(advertised) == {name}, f"{name} gives itself out as {advertised}")
        called = value(argv, "--name")
        need(called is None or called == name, f"{name} calls itself {called}")
        for hook in service.get("pre_stop", []):
            need(name in " ".join(words(hook["command"])).split(), f"{name}'s pre_stop takes out another")
        mounts = {v[1]: inside(made, v[1].rpartition("/")[2]) for v in volumes if v[1].startswith("/secrets/")}
        files_are_made(name, everything, made, mounts)
        for key in environment:
            need(
                not re.search("PASSWORD|TOKEN|SECRET", key) or re.search("_FILE$|CLUSTER_TOKEN$", key),
                f"{name} has a secret in {key}",
            )
        if name in etcds:
            cluster = environment["ETCD_INITIAL_CLUSTER"]
            need(hosts(cluster) == etcds, f"{name} knows other etcds than there are: {cluster}")
            mine = {hosts(environment[key]).pop() for key in environment if "ADVERTISE" in key}
            need(mine | {environment["ETCD_NAME"]} == {name}, f"{name} gives itself out as {mine}")
        if name in coordinators:
            need(hosts(value(argv, "--store") or "") == etcds, f"{name} does not know all etcds")
            certified = set(words(services["secrets"]["command"]))
            need(name in certified, f"no certificate is made for {name}")
    declared = set(file["volumes"])
    need(used_volumes == declared, f"volumes: declared {sorted(declared)}, used {sorted(used_volumes)}")
    need(used_networks == set(file["networks"]), f"networks: used {sorted(used_networks)}")


def check_kubernetes(made: Path) -> None:
    every = manifests()
    names = {(it["kind"], it["metadata"]["name"]) for it in every}
    sets = [it for it in every if it["kind"] == "StatefulSet"]
    templates = [it["spec"]["template"] for it in sets]
    labels = [it["metadata"]["labels"] for it in templates] + OTHERS_LABELS
    secrets = OTHERS_SECRETS | {f"reknit-{who}": inside(made, who) for who in ("coordinator", "worker")}

    def selects(who: str, wanted: dict, among: list[dict]) -> list[dict]:
        hit = [it for it in among if wanted.items() <= it.items()]
        need(hit, f"{who} selects {wanted}, which nothing has")
        return hit

    for it in every:
        who, spec = f"{it['kind']} {it['metadata']['name']}", it.get("spec", {})
        if it["kind"] == "Service":
            for chosen in templates:
                if not spec["selector"].items() <= chosen["metadata"]["labels"].items():
                    continue
                ports = {port["name"] for c in chosen["spec"]["containers"] for port in c["ports"]}
                for port in spec["ports"]:
                    need(port["targetPort"] in ports, f"{who} leads to port {port['targetPort']}")
            selects(who, spec["selector"], labels)
        if it["kind"] == "PodDisruptionBudget":
            selects(who, spec["selector"]["matchLabels"], labels)
        if it["kind"] == "NetworkPolicy":
            selects(who, spec["podSelector"]["matchLabels"], labels)
            for way in [*spec.get("ingress", []), *spec.get("egress", [])]:
                for peer in [*way.get("from", []), *way.get("to", [])]:
                    if wanted := peer.get("podSelector", {}).get("matchLabels"):
                        selects(who, wanted, labels)
    for it in sets:
        who, spec = f"StatefulSet {it['metadata']['name']}", it["spec"]
        pod, mine = spec["template"]["spec"], [spec["template"]["metadata"]["labels"]]
        selects(who, spec["selector"]["matchLabels"], mine)
        for spread in pod["topologySpreadConstraints"]:
            selects(who, spread["labelSelector"]["matchLabels"], mine)
        need(("Service", spec["serviceName"]) in names, f"{who} has no Service {spec['serviceName']}")
        need(("ServiceAccount", pod["serviceAccountName"]) in names, f"{who} has no ServiceAccount")
        content = {}
        for volume in pod["volumes"]:
            secret = volume["secret"]["secretName"]
            need(secret in secrets, f"{who} wants the Secret {secret}, which nobody makes")
            content[volume["name"]] = secrets.get(secret, set())
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: content.get(mount["name"], set()) for mount in container["volumeMounts"]}
            environment = [entry.get("value", "") for entry in container["env"]]
            files_are_made(who, " ".join(container["args"] + environment), made, mounts)
            for source in container["envFrom"]:
                config = source["configMapRef"]["name"]
                need(("ConfigMap", config) in names, f"{who} wants the ConfigMap {config}")
            advertised = value(container["args"], "--advertise") or ""
            need(
                "$(POD_NAME)" not in advertised or f"$(POD_NAME).{spec['serviceName']}:" in advertised,
                f"{who} gives itself out as {advertised}",
            )
    # Workers know every coordinator, by its name.
    coordinator = next(it for it in sets if it["metadata"]["name"] == "reknit-coordinator")
    service = coordinator["spec"]["serviceName"]
    pods = {f"reknit-coordinator-{n}.{service}" for n in range(coordinator["spec"]["replicas"])}
    config = next(it for it in every if it["kind"] == "ConfigMap" and it["metadata"]["name"] == "reknit-worker")
    need(hosts(config["data"]["REKNIT_COORDINATOR"]) == pods, f"workers should know {sorted(pods)}")
    readme = (HERE / "README.md").read_text()
    for pod_name in pods | {"reknit"}:
        need(pod_name in readme.split(), f"README.md makes no certificate for {pod_name}")


def command_lines() -> list[list[str]]:
    """Every command line of these programs in these files."""
    lines, scripts = [], []
    for service in compose()["services"].values():
        if "command" not in service:
            continue
        lines.append((words(service.get("entrypoint")) or ["reknit"]) + words(service.get("command")))
        scripts += [words(hook["command"]) for hook in service.get("pre_stop", [])]
    for it in manifests():
        if it["kind"] != "StatefulSet":
            continue
        for container in it["spec"]["template"]["spec"]["containers"]:
            lines.append(container.get("command", ["reknit"]) + container["args"])
            hook = container.get("lifecycle", {}).get("preStop")
            probes = [container.get(name) for name in ("startupProbe", "livenessProbe", "readinessProbe")]
            scripts += [probe["exec"]["command"] for probe in [hook, *probes] if probe]
    for script in scripts:
        text = script[2] if script[:2] == ["sh", "-c"] else " ".join(script)
        lines += [shlex.split(part) for part in re.split(r"&&|;|>\S+", text)]
    return [line for line in lines if line and line[0] in ("reknit", "reknit-digits")]


def check_flags(programs: Path) -> None:
    used: dict[tuple[str, ...], set[str]] = {}
    for program, *rest in command_lines():
        command = (program, rest[0]) if program == "reknit" else (program,)
        used.setdefault(command, set()).update(w.partition("=")[0] for w in rest if w.startswith("--"))
    for (program, *command), flags in used.items():
        asked = subprocess.run([programs / program, *command, "--help"], capture_output=True, text=True, timeout=10)
        need(asked.returncode == 0, f"{program} {' '.join(command)}: {asked.stderr.strip()}")
        known = set(re.findall(r"--[a-z][a-z-]*", asked.stdout))
        if asked.returncode == 0:
            need(flags <= known, f"{program} {' '.join(command)} does not know {sorted(flags - known)}")


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "names":
        check_compose(where)
        check_kubernetes(where)
    else:
        check_flags(where)
    print("\n".join(wrong))
    sys.exit(bool(wrong))
