"""Exit with 0 where the server answers. Any answer but a 5xx will do: the API that has the URL is a plugin.

Usage: python healthcheck.py [URL]

A server that is given a certificate answers HTTPS alone, at the same port: that is tried where HTTP gets no answer.
"""

import ssl
import sys
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

URL = "http://127.0.0.1:5000/health/live"
TIMEOUT_S = 5


def problem(url: str) -> str | None:
    """Return why the server is unhealthy, or None."""
    # Nobody comes between on the container's own loopback, and the certificate is for the name that clients use.
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    # A proxy that the container is given is not for its own address.
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=unverified))
    try:
        opener.open(url, timeout=TIMEOUT_S).close()
    except HTTPError as error:
        return None if error.code < 500 else f"{url} answered {error.code}"
    except (OSError, HTTPException) as error:
        told = f"{url} does not answer: {error}"
        # The server took the request and closed the connection. One that it did not take is a URLError instead.
        if url.startswith("http:") and isinstance(error, (ConnectionError, HTTPException)):
            over_tls = problem(url.replace("http:", "https:", 1))
            return over_tls and f"{told}; {over_tls}"
        return told
    return None


if __name__ == "__main__":
    sys.exit(problem(sys.argv[1] if len(sys.argv) > 1 else URL))
