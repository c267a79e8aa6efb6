"""Composition: what keeps programs running. In: a folder's name and role. Out: start.sh, install.sh, systemd's units.

At a hospital two users share the work. `consilium` reads images and has no network at all. `consilium-node` speaks to
the coordinator and can reach nothing of the first but its socket: whoever controls the coordinator's SuperLink can make
a node run code, which is then this user's. Nothing asks the internet for anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from consilium.deployment.processes import CA, NODE_KEY, QUIET

PROGRAM = "/opt/consilium/bin/consilium"  # where install.sh and the units expect the package
SERVICE_USER, NODE_USER, LEADER = "consilium", "consilium-node", "consilium-coordinator"
OFFLINE = {**QUIET, "HF_HUB_OFFLINE": "1"}

START = """#!/bin/sh
# To try out, in a terminal: runs until Ctrl-C. In earnest: install.sh. Needs `consilium` on the path.
set -eu
cd "$(dirname "$0")"
{exports}
exec consilium {words} . "$@"
"""

UNIT = """# Written by `consilium deploy init`; install.sh puts it into /etc/systemd/system.
[Unit]
Description=Consilium: {title}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
User={user}
Group={user}
ExecStart={program} {words}
# Starts again however it ended; 2 says that a file must be mended first. Flower refuses a node for about a minute after
# its death: the node is tried again until it is let in.
Restart=always
RestartSec=20
RestartPreventExitStatus=2
KillMode=mixed
TimeoutStopSec=30
{environment}
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
PrivateTmp=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
{own}

[Install]
WantedBy=multi-user.target
"""

SITE_OWN = """# No network: it is asked through a socket, which one other user can reach. GPUs stay visible.
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
SupplementaryGroups={node_user}
RuntimeDirectory=consilium/{name}
RuntimeDirectoryMode=0750
CacheDirectory=consilium/{name}
CacheDirectoryMode=0700
Environment=XDG_CACHE_HOME={cache}
ReadWritePaths={home}"""

NODE_OWN = """# Where the way out is a proxy: HTTPS_PROXY=http://user:password@proxy:3128, in this file, for root alone.
EnvironmentFile=-/etc/consilium/node.env
PrivateDevices=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
InaccessiblePaths=-/var/lib/consilium -/var/cache/consilium
ReadWritePaths={home}"""

LEADER_OWN = """RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
Environment=XDG_CACHE_HOME={home}/cache
ReadWritePaths={home}"""

INSTALL_SITE = """#!/bin/sh
# At the hospital, as root, from this folder: two users, their folders, two services. Harmless when run again.
# Before: python3 -m venv /opt/consilium; /opt/consilium/bin/pip install 'consilium[flower]'
set -eu
cd "$(dirname "$0")"
for user in {user} {node_user}; do
    id "$user" >/dev/null 2>&1 || useradd --system --user-group --no-create-home --home-dir "/var/lib/$user" \\
        --shell /usr/sbin/nologin "$user"
done
install -d -m 0700 -o {user} -g {user} /var/lib/{user} {home} {home}/keys
install -d -m 0755 /var/cache/consilium
install -d -m 0700 -o {user} -g {user} {cache}
install -d -m 0700 -o {node_user} -g {node_user} /var/lib/{node_user} {node_home} {node_home}/keys
install -m 0600 -o {user} -g {user} federation.toml {home}
[ -e {home}/site.toml ] || install -m 0600 -o {user} -g {user} site.toml {home}
install -m 0600 -o {user} -g {user} keys/{ca} {home}/keys
install -m 0600 -o {node_user} -g {node_user} federation.toml {node_home}
install -m 0600 -o {node_user} -g {node_user} keys/{ca} keys/{node_key} {node_home}/keys
install -m 0644 systemd/*.service /etc/systemd/system
systemctl daemon-reload
echo "Installed. Fill in {home}/site.toml, let {user} read the images, then:"
echo "  runuser -u {user} -- env XDG_CACHE_HOME={cache} {program} site check {home}"
echo "  systemctl enable --now consilium-site-{name} consilium-node-{name}"
"""

INSTALL_LEADER = """#!/bin/sh
# At the coordinator, as root, from this folder: a user, its folder, a service. Harmless when run again.
# Before: python3 -m venv /opt/consilium; /opt/consilium/bin/pip install 'consilium[flower]'
set -eu
cd "$(dirname "$0")"
id {user} >/dev/null 2>&1 || useradd --system --user-group --no-create-home --home-dir {home} \\
    --shell /usr/sbin/nologin {user}
install -d -m 0700 -o {user} -g {user} {home}
cp -R federation.toml app keys nodes {home}
chown -R {user}:{user} {home}
install -m 0644 systemd/*.service /etc/systemd/system
systemctl daemon-reload
echo "Installed. Then: systemctl enable --now consilium-coordinator"
echo "  runuser -u {user} -- {program} coordinator submit {home}"
"""


def leader(folder: Path) -> None:
    """The scripts and the unit of the coordinator."""
    home = f"/var/lib/{LEADER}"
    words = f"coordinator start {home}"
    own = LEADER_OWN.format(home=home)
    _script(folder / "start.sh", START.format(words="coordinator start", exports=_exports()))
    _script(folder / "install.sh", INSTALL_LEADER.format(user=LEADER, home=home, program=PROGRAM))
    _unit(folder, "consilium-coordinator", "the coordinator's SuperLink", LEADER, words, own)


def site(folder: Path, name: str) -> None:
    """The scripts and the two units of a hospital."""
    home, node_home = f"/var/lib/{SERVICE_USER}/{name}", f"/var/lib/{NODE_USER}/{name}"
    socket, cache = f"/run/consilium/{name}/site", f"/var/cache/consilium/{name}"
    users = {"user": SERVICE_USER, "node_user": NODE_USER, "home": home, "node_home": node_home, "name": name}
    _script(folder / "start.sh", START.format(words="site join", exports=_exports()))
    keys = {"ca": CA, "node_key": NODE_KEY}
    _script(folder / "install.sh", INSTALL_SITE.format(**users, **keys, program=PROGRAM, cache=cache))
    words = f"site join {home} --service-only --socket {socket} --node-user {NODE_USER}"
    own = SITE_OWN.format(node_user=NODE_USER, name=name, home=home, cache=cache)
    _unit(folder, f"consilium-site-{name}", f"service of {name}, which reads images", SERVICE_USER, words, own)
    words = f"site node {node_home} --socket {socket}"
    own = NODE_OWN.format(home=node_home)
    _unit(folder, f"consilium-node-{name}", f"node of {name}, which speaks to the coordinator", NODE_USER, words, own)


def _unit(folder: Path, file: str, title: str, user: str, words: str, own: str) -> None:
    path = folder / "systemd" / f"{file}.service"
    path.parent.mkdir(exist_ok=True)
    environment = "\n".join(f"Environment={each}" for each in _pairs(OFFLINE))
    text = UNIT.format(title=title, user=user, program=PROGRAM, words=words, environment=environment, own=own)
    path.write_text(text, encoding="utf-8")


def _script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def _exports() -> str:
    return "\n".join(f"export {each}" for each in _pairs(OFFLINE))


def _pairs(table: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in table.items()]
