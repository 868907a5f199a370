"""Certificates for one run: a CA, a broker's, one that has expired, and clients' of both kinds, as PEM files."""

from datetime import datetime, timedelta, timezone
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

NAMES = ("broker", "expired_broker", "client", "expired_client")


def make(folder: Path) -> None:
    """Writes `ca.pem`, and for each of `NAMES` NAME.pem: its key, then its certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA(organization_name="kbatch tests")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    now = datetime.now(timezone.utc)
    for name in NAMES:
        begin, end = (now - timedelta(2), now - timedelta(1)) if name.startswith("expired") else (None, None)
        certificate = authority.issue_cert(
            "localhost", "127.0.0.1", common_name=name, not_before=begin, not_after=end or now + timedelta(7)
        )
        key = load_pem_private_key(certificate.private_key_pem.bytes(), password=None)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # the only one that Kafka reads
        pem += b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
        (folder / f"{name}.pem").write_bytes(pem)
