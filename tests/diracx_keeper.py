"""Keeps a real DiracX server on this machine: databases in SQLite files, moto's S3, no identity provider.

Run by the interpreter of the environment that DiracX is installed in: `python diracx_keeper.py DIRECTORY`. The first line it
prints is what one has to know, as JSON. It understands `stop`, `kill`, `start` and `expired TOKEN` on standard input,
answers each with a line, and ends the servers when there is no more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 120.0

USERS = {name: {"PreferedUsername": name.removeprefix("sub-")} for name in ("sub-alice", "sub-bob", "sub-pilot")}
GROUPS = {
    "user": {"Properties": ["NormalUser"], "Users": ["sub-alice", "sub-bob"]},
    "pilot": {"Properties": ["GenericPilot", "LimitedDelegation"], "Users": ["sub-pilot"]},
    "admin": {"Properties": ["NormalUser", "JobAdministrator", "ServiceAdministrator"], "Users": ["sub-alice"]},
}
CONFIGURATION = {
    "DIRAC": {},
    "Operations": {"Defaults": {}},
    "Systems": {},
    "Registry": {
        "testvo": {
            "DefaultGroup": "user",
            "IdP": {"URL": "https://idp.invalid", "ClientID": "test"},
            "Users": USERS,
            "Groups": GROUPS,
        }
    },
}

EXPIRED = """
import json, sys, time
from joserfc import jwt
from joserfc.jwk import KeySet
keys = KeySet.import_key_set(json.load(open(sys.argv[1])))
key = next(key for key in keys.keys if "sign" in (key.get("key_ops") or ["sign"]))
token = jwt.decode(sys.argv[2], keys, algorithms=[key.get("alg")])
claims = dict(token.claims, exp=int(time.time()) - 3600)
print(jwt.encode({"alg": key.get("alg"), "kid": key.get("kid")}, claims, keys, algorithms=[key.get("alg")]))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Keeper:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = (home / "server.log").open("wb")
        self.s3, self.port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server: subprocess.Popen[bytes] | None = None
        secret = secrets.token_bytes(32)
        self.key = "diracx:legacy:" + base64.urlsafe_b64encode(secret).decode()
        self.env = self._environment(secret)
        self.store = self._run([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.s3)])
        self._wait(f"http://127.0.0.1:{self.s3}/moto-api/", self.store)

    def _environment(self, secret: bytes) -> dict[str, str]:
        (self.home / "db").mkdir()
        configuration = self.home / "cs"
        configuration.mkdir()
        (configuration / "default.yml").write_text(json.dumps(CONFIGURATION))
        git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-C", str(configuration)]
        for words in (["init", "-q", "-b", "master"], ["add", "."], ["commit", "-qm", "configuration"]):
            subprocess.run([*git, *words], check=True, stdout=self.log, stderr=self.log)
        keys = str(self.home / "jwks.json")
        self._do("diracx.logic", "rotate-jwk", "--jwks-path", keys)
        lines = self._do("diracx.db", "generate-local-urls", str(self.home / "db")).splitlines()
        databases = dict(shlex.split(line)[1].split("=", 1) for line in lines)
        s3 = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return {
            **os.environ,
            **databases,
            "DIRACX_CONFIG_BACKEND_URL": f"git+file://{configuration}",
            "DIRACX_SERVICE_AUTH_TOKEN_KEYSTORE": f"file://{keys}",
            "DIRACX_SERVICE_AUTH_STATE_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            "DIRACX_SERVICE_AUTH_TOKEN_ISSUER": self.url,
            "DIRACX_SERVICE_AUTH_ALLOWED_REDIRECTS": json.dumps([f"{self.url}/api/docs/oauth2-redirect"]),
            "DIRACX_SANDBOX_STORE_BUCKET_NAME": "sandboxes",
            "DIRACX_SANDBOX_STORE_AUTO_CREATE_BUCKET": "true",
            "DIRACX_SANDBOX_STORE_S3_CLIENT_KWARGS": json.dumps({"endpoint_url": f"http://127.0.0.1:{self.s3}", **s3}),
            "DIRACX_LEGACY_EXCHANGE_HASHED_API_KEY": hashlib.sha256(secret).hexdigest(),
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
        }

    def _do(self, module: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *words], check=True, stdout=subprocess.PIPE, stderr=self.log
        )
        return done.stdout.decode()

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=self.env)

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", "diracx.testing.routers:create_app"]
        self.server = self._run([*command, "--host", "127.0.0.1", "--port", str(self.port), "--log-level", "warning"])
        self._wait(f"{self.url}/api/health/ready", self.server)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.server is not None:
            self.server.send_signal(number)
            self.server.wait()
            self.server = None

    def expired(self, token: str) -> str:
        """A token of the server's that was good an hour ago."""
        words = [sys.executable, "-c", EXPIRED, str(self.home / "jwks.json"), token]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    def close(self) -> None:
        self.stop(signal.SIGKILL)
        self.store.kill()
        self.store.wait()

    def _wait(self, url: str, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.05)


def main() -> None:
    keeper = Keeper(Path(sys.argv[1]))
    try:
        keeper.start()
        print(json.dumps({"url": keeper.url, "key": keeper.key}), flush=True)
        for line in sys.stdin:
            word, _, rest = line.strip().partition(" ")
            if word == "stop":
                keeper.stop()
            elif word == "kill":
                keeper.stop(signal.SIGKILL)
            elif word == "start":
                keeper.start()
            print(keeper.expired(rest) if word == "expired" else "done", flush=True)
    finally:
        keeper.close()


if __name__ == "__main__":
    main()
