"""A DNS server for one test, in namespaces of its own: the whole network and the resolver's settings of whoever enters them.

`unshare … python dns_server.py ZONE RESOLV_CONF` answers on 127.0.0.1:53 as the file ZONE says at that moment, in JSON: a list of addresses
for every name, or "NXDOMAIN", "SERVFAIL" or "silence". Says "ready" on standard output, and ends with its standard input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from dnslib import QTYPE, RCODE, RR, A, DNSRecord
from dnslib.server import BaseResolver, DNSHandler, DNSServer


class Zone(BaseResolver):  # type: ignore[misc]
    def __init__(self, path: Path) -> None:
        self.path = path

    def resolve(self, request: DNSRecord, handler: DNSHandler) -> DNSRecord:
        says = json.loads(self.path.read_text())
        if says == "silence":
            raise EOFError("no answer")
        reply = request.reply()
        if isinstance(says, str):
            reply.header.rcode = getattr(RCODE, says)
        elif request.q.qtype == QTYPE.A:
            for address in says:
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=0))
        return reply


class Quiet:
    def __getattr__(self, name: str) -> object:
        return lambda *arguments: None


def main() -> None:
    zone, settings = Path(sys.argv[1]), Path(sys.argv[2])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    settings.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    subprocess.run(["mount", "--bind", str(settings), "/etc/resolv.conf"], check=True)
    DNSServer(Zone(zone), address="127.0.0.1", port=53, logger=Quiet()).start_thread()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
