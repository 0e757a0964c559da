"""The bundled app, configured by the environment: ``uvicorn incidentkit.http.asgi:app``.

The variables are those of :class:`~incidentkit.settings.Settings`, also from a ``.env`` file in the
working directory. Once the database has had an access token, every request needs one. Unless
logging is already configured, incidentkit's records of level INFO and above, one for each request,
go to stderr with the id of the request.
"""

import gc
import logging

from incidentkit.client import IncidentClient
from incidentkit.http.app import create_app
from incidentkit.http.authentication import TokenAuth
from incidentkit.http.bounds import Bounds
from incidentkit.http.browsers import LOOPBACK, BrowserGuard
from incidentkit.settings import Settings

_logger = logging.getLogger("incidentkit")
if not _logger.hasHandlers():
    _handler = logging.StreamHandler()
    _handler.setFormatter(
        logging.Formatter("%(levelname)s: %(message)s %(request_id)s", defaults={"request_id": ""})
    )
    _logger.addHandler(_handler)
    _logger.setLevel(logging.INFO)

_settings = Settings.from_env()
_client = IncidentClient.from_settings(_settings)

app = create_app(
    _client,
    request_log=_settings.request_log,
    cache_required=_settings.redis_required,
    stream_lifetime=_settings.stream_lifetime,
    cors=_settings.cors_origins,
    authenticate=TokenAuth(
        _client, anonymous="always" if _settings.allow_anonymous else "until_token"
    ),
    bounds=Bounds(
        requests=_settings.requests_per_token,
        readers=_settings.readers_per_token,
        searches=_settings.searches_per_token,
    ),
    trusted_proxies=_settings.trusted_proxies,
)
if _settings.allowed_hosts:
    app.add_middleware(
        BrowserGuard,
        hosts={*LOOPBACK, *_settings.allowed_hosts},
        origins={*_settings.allowed_hosts, *_settings.cors_origins},
    )

# The objects loaded so far stay; the garbage collector need not visit them again.
gc.freeze()
