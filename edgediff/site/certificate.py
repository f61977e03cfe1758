"""HTTPS in a local network: the addresses of this machine there, and a certificate for them, made for one run."""

import datetime
import hashlib
import socket
import ssl
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import trustme

from edgediff.errors import SiteError

# Safari takes no certificate for longer than 825 days, and a run is short.
DAYS = 30
# The system says from which address it would send there; nothing is sent. The first, of a network that exists only in
# documentation, goes where the internet is; the others may go through a VPN, a hotspot or a container's network.
PROBES = ("203.0.113.1", "192.168.0.1", "10.0.0.1", "172.16.0.1", "169.254.0.1")


@dataclass(frozen=True)
class Certificate:
    """What a server shows.

    Attributes:
        context: The certificate and its private key, for connections.
        fingerprint: SHA-256 of the certificate, in hexadecimal pairs with colons, as browsers show it.
    """

    context: ssl.SSLContext
    fingerprint: str


def lan_addresses() -> list[str]:
    """IPv4 addresses of this machine in its networks, the usual one first.

    Raises:
        SiteError: It has none.
    """
    found = dict.fromkeys(address for probe in PROBES if (address := _address_towards(probe)) is not None)
    if not found:
        raise SiteError("this machine has no address in a network; connect it to one, or leave --lan out")
    return list(found)


def _address_towards(there: str) -> str | None:
    """The address that packets to another one would come from; None where there is no way, or none out of here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((there, 9))  # of a datagram socket: sends nothing
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") or address == "0.0.0.0" else address


def make_certificate(addresses: Iterable[str]) -> Certificate:
    """A certificate for addresses and this machine itself; its key is on the disk only until it is read."""
    now = datetime.datetime.now(datetime.UTC)
    leaf = trustme.CA(organization_name="edgediff serve").issue_cert(
        *addresses, "127.0.0.1", "localhost",
        organization_name="edgediff serve",
        not_before=now - datetime.timedelta(days=1),
        not_after=now + datetime.timedelta(days=DAYS),
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Python reads keys from files only. No other user may look into the folder (mode 0700), and it is gone before
    # anything is served.
    with (
        tempfile.TemporaryDirectory(prefix="edgediff-") as folder,
        leaf.private_key_and_cert_chain_pem.tempfile(folder) as file,
    ):
        context.load_cert_chain(file)
    shown = ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode("ascii"))
    return Certificate(context, hashlib.sha256(shown).digest().hex(":").upper())
