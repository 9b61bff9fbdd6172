"""A client of the feature extraction server.

from feature_extraction_server.client import Client

with Client("http://localhost:5000") as client:
    print(client.caption("cat.jpg"))
"""

from feature_extraction_server.client.client import Client, Outcome
from feature_extraction_server.client.errors import ConnectionFailed, FesError, ServerError, TimedOut, Unreachable
from feature_extraction_server.client.features import Detections, Face, SpeakerSegment
from feature_extraction_server.client.media import Media

__all__ = [
    "Client",
    "ConnectionFailed",
    "Detections",
    "Face",
    "FesError",
    "Media",
    "Outcome",
    "ServerError",
    "SpeakerSegment",
    "TimedOut",
    "Unreachable",
]
