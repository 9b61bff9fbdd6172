"""Exit with 0 where the server answers. Any answer but a 5xx will do: the API that has the URL is a plugin.

Usage: python healthcheck.py [URL]
"""

import sys
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

URL = "http://127.0.0.1:5000/health/live"
TIMEOUT_S = 5


def problem(url: str) -> str | None:
    """Return why the server is unhealthy, or None."""
    opener = build_opener(ProxyHandler({}))  # a proxy that the container is given is not for its own address
    try:
        opener.open(url, timeout=TIMEOUT_S).close()
    except HTTPError as error:
        return None if error.code < 500 else f"{url} answered {error.code}"
    except (OSError, HTTPException) as error:
        return f"{url} does not answer: {error}"
    return None


if __name__ == "__main__":
    sys.exit(problem(sys.argv[1] if len(sys.argv) > 1 else URL))
