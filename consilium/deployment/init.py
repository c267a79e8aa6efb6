"""Composition: folders of a new federation. In: an agreement. Out: a folder for the coordinator and one per hospital.

Certificates and keys are for trying out: whoever made them could read everything. In earnest the coordinator's
certificate comes from an authority that all trust, and each hospital makes its own node key, of which only the public
half leaves it.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from consilium.deployment import files, leaflets, processes, services, shim
from consilium.deployment.files import Deployment
from consilium.deployment.processes import CA, CERTIFICATE, KEY, NODE_KEY, PUBLIC_KEY
from consilium.errors import StateError

TRIAL = timedelta(days=90)  # a certificate for trying out does not last


def init(federation: Path, out: Path, template: Path | None = None) -> list[Path]:
    """Make all folders; the template is the own file of every site, without its name. StateError where one is there."""
    agreement = files.read_text(federation)
    if template is not None:
        files.check_template(template)
    folders = [out / name for name in (files.COORDINATOR, *agreement.deployment.sites)]
    taken = [str(folder) for folder in folders if folder.exists()]
    if taken:
        raise StateError("these folders are there already", received=", ".join(taken), remedy="choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _all(partial, federation, agreement.deployment, template)
        for folder in folders:
            (partial / folder.name).rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it holds keys
    return folders


def _all(out: Path, federation: Path, deployment: Deployment, template: Path | None) -> None:
    _coordinator(out / files.COORDINATOR, federation, deployment.address)
    for site in deployment.sites:
        _site(out / site, site, federation, template)
        leaflets.site(out / site, site, deployment.address)
        shutil.copy(out / files.COORDINATOR / "keys" / CA, out / site / "keys" / CA)
        shutil.copy(out / site / "keys" / PUBLIC_KEY, out / files.COORDINATOR / files.NODES / f"{site}.pub")


def _coordinator(folder: Path, federation: Path, address: str) -> None:
    keys = _private(folder / "keys")
    (folder / files.NODES).mkdir()
    shutil.copy(federation, folder / files.FEDERATION)
    files.settle(folder)  # `init` has just read it
    certificates(keys, address.rpartition(":")[0])
    shim.write(folder / processes.APP)
    services.leader(folder)
    leaflets.leader(folder, address)


def _site(folder: Path, name: str, federation: Path, template: Path | None) -> None:
    keys = _private(folder / "keys")
    _private(folder / files.SOCKET.parent)
    shutil.copy(federation, folder / files.FEDERATION)
    own = template.read_text(encoding="utf-8") if template is not None else TEMPLATE
    (folder / files.SITE).write_text(f'site = "{name}"\n\n{own}', encoding="utf-8")
    node_key(keys, f"{name}")
    services.site(folder, name)


def _private(folder: Path) -> Path:
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    return folder


# ------------------------------------------------------------------------------------------------ keys
def certificates(folder: Path, host: str) -> None:
    """An authority, and a server's certificate that it signs for `host` and this machine."""
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Consilium trial authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    authority = x509.BasicConstraints(ca=True, path_length=0)
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    ca = _certificate(issuer, issuer, ca_key.public_key()).add_extension(authority, critical=True)
    ca = ca.add_extension(signs, critical=True)
    names = x509.SubjectAlternativeName([*{_name(host): 0, _name("127.0.0.1"): 0, _name("localhost"): 0}])
    serves = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    server = _certificate(subject, issuer, key.public_key()).add_extension(names, critical=False)
    server = server.add_extension(serves, critical=False)
    server = server.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    _write(folder / "ca.key", _pem(ca_key), secret=True)
    _write(folder / CA, ca.sign(ca_key, hashes.SHA384()).public_bytes(Encoding.PEM))
    _write(folder / CERTIFICATE, server.sign(ca_key, hashes.SHA384()).public_bytes(Encoding.PEM))
    _write(folder / KEY, _pem(key), secret=True)


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    named = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    dated = named.not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + TRIAL)
    return dated.serial_number(x509.random_serial_number())


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def node_key(folder: Path, comment: str) -> None:
    """The key pair by which a site's node is known, as Flower wants it: P-384, in OpenSSH's form."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _write(folder / NODE_KEY, private, secret=True)
    _write(folder / PUBLIC_KEY, public + f" {comment}\n".encode())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, data: bytes, *, secret: bool = False) -> None:
    path.touch(mode=0o600 if secret else 0o644)
    path.write_bytes(data)


TEMPLATE = """# What this hospital adds to the agreement: where its images lie, and on what it computes.

[sites]
source = "manifest"                    # `consilium list sources`: also folders of images, ...
table = "data/table.csv"               # one row per image
images = "data/images"                 # a folder or a zip file
columns = { image = "image", label = "label", group = "patient" }
split = { train = 0.7, val = 0.1, test = 0.2, seed = 0 }

[engine]
device = "auto"                        # the GPU where there is one
threads = 4
# state_key_file = "keys/state.key"    # encrypts what this hospital keeps between rounds; docs/encryption.md

# [backbone]
# weights = "weights/model.safetensors"  # if the file lies elsewhere here than the agreement says
"""
