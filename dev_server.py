"""Run the development server from a checkout: the core and all of ``plugins/``, none of them installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = [ROOT / "feature_extraction_server-core", *sorted((ROOT / "plugins").glob("feature_extraction_server-*"))]
sys.path[:0] = [str(folder) for folder in SOURCES]

if __name__ == "__main__":
    from feature_extraction_server.flask.dev_server import main

    main()
