FROM python:3.13-slim AS build

RUN python -m venv /opt/incidentkit
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY incidentkit incidentkit
# The constraints hold for what builds the wheel too, which does not get into the image.
RUN python -m pip install --no-cache-dir --constraint constraints.txt hatchling \
    && python -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels . \
    && /opt/incidentkit/bin/python -m pip install --no-cache-dir --constraint constraints.txt "$(echo /wheels/*.whl)[all]"


FROM python:3.13-slim

RUN groupadd --gid 10001 incidentkit \
    && useradd --no-log-init --uid 10001 --gid 10001 --home-dir /data --shell /usr/sbin/nologin incidentkit \
    && install --directory --owner incidentkit --group incidentkit /data
COPY --from=build /opt/incidentkit /opt/incidentkit
ENV PATH="/opt/incidentkit/bin:$PATH" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# Without a configured database, the SQLite file is created here: mount a volume to keep it.
WORKDIR /data
USER 10001:10001
EXPOSE 8000

HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client; connection = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); connection.request('GET', '/health/live'); raise SystemExit(connection.getresponse().status != 200)"]

ENTRYPOINT ["incidentkit"]
CMD ["serve", "--host", "0.0.0.0"]
