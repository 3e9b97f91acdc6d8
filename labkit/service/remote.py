"""Images by web address, where the service allows them: public addresses only, small, soon, and few redirects.

The name is resolved once and the connection goes to that very address, so that a name cannot point elsewhere
between the check and the request. Every redirect is checked as the first address was.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urljoin, urlsplit

import httpx

from labkit.common.errors import MediaError

MAX_BYTES = 20 * 2**20
MAX_REDIRECTS = 3
SECONDS = 10.0


class RemoteImages:
    """Fetches images.

    Args:
        transport: for tests; httpx's own if None.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None):
        self._client = httpx.AsyncClient(
            transport=transport, trust_env=False, timeout=SECONDS, follow_redirects=False
        )

    async def fetch(self, url: str) -> bytes:
        """The image's bytes, at most `MAX_BYTES`.

        Raises:
            MediaError: a private or unknown address, too large, too slow, an error there.
        """
        try:
            async with asyncio.timeout(SECONDS):
                for _ in range(MAX_REDIRECTS + 1):
                    answer = await self._get(url)
                    if isinstance(answer, bytes):
                        return answer
                    url = urljoin(url, answer)
        except TimeoutError:
            raise MediaError(f"the image was not there within {SECONDS:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            raise MediaError(f"the image cannot be fetched ({type(error).__name__})") from None
        raise MediaError(f"the image is behind more than {MAX_REDIRECTS} redirects")

    async def _get(self, url: str) -> bytes | str:
        """The body, or where a redirect leads."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise MediaError("an image's address begins with http:// or https:// and a host's name")
        address = await public_address(parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme])
        host = f"[{address}]" if ":" in address else address
        port = f":{parts.port}" if parts.port else ""
        target = parts._replace(netloc=host + port).geturl()
        headers = {"Host": parts.netloc, "Accept": "image/*", "User-Agent": "labkit"}
        async with self._client.stream(
            "GET", target, headers=headers, extensions={"sni_hostname": parts.hostname}
        ) as response:
            if response.is_redirect and "location" in response.headers:
                return response.headers["location"]
            if response.status_code != 200:
                raise MediaError(f"the image's server answered with status {response.status_code}")
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise MediaError(f"the image is larger than {MAX_BYTES // 2**20} MiB")
            return bytes(body)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


async def public_address(name: str, port: int) -> str:
    """An address of a host, all of whose addresses are public.

    Raises:
        MediaError: unknown, or one of its addresses is private, local or otherwise not of the internet.
    """
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise MediaError("the image's host is unknown") from None
    addresses = [ipaddress.ip_address(entry[4][0].partition("%")[0]) for entry in entries]
    if not addresses or not all(_is_public(address) for address in addresses):
        raise MediaError("the image's host is not on the public internet")
    return str(addresses[0])


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if inner is not None:
        return _is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved
