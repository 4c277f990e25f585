"""An SFTP server on loopback, as a process of its own: ``python sftp_server.py PORT``."""

from __future__ import annotations

import asyncio
import sys

import asyncssh

USER, PASSWORD = "ci", "ci-password-7f3a9c"


class Guarded(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, PASSWORD)


async def serve(port: int) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    await asyncssh.listen("127.0.0.1", port, server_factory=Guarded, server_host_keys=[key], sftp_factory=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
