# One image for the server and the workers; docker-compose.yml says which of the two a container is.
FROM python:3.13-slim

ENV PYTHONUNBUFFERED=1
# Of the build alone: the commands that tasks run do not see these.
ARG PIP_NO_CACHE_DIR=1
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_ROOT_USER_ACTION=ignore

# What runs here cannot change the program: only its home and these two folders belong to it.
RUN useradd --create-home --uid 10001 tower \
    && install --directory --owner tower --group tower /app/logs /app/data
WORKDIR /app

# Packages change seldom: this layer is kept when only the source changes.
COPY requirements.txt requirements-dashboard.txt ./
RUN pip install -r requirements.txt \
    && pip install --no-deps -r requirements-dashboard.txt

COPY pyproject.toml README.md ./
COPY devops_control_tower devops_control_tower
COPY tower tower
COPY actors actors
RUN pip install --no-deps --editable . \
    && python -m compileall -q actors devops_control_tower tower

USER tower

# With neither DATABASE_URL nor REDIS_URL given, one container is a whole tower. HOST reaches beyond loopback, so it takes requests
# with a key only: TOWER_BOOTSTRAP_KEY is the first, or TOWER_ANONYMOUS=admin says that something else guards the port.
ENV HOST=0.0.0.0 \
    PORT=8000 \
    TRACE_DIR=/app/logs \
    DATABASE_URL=sqlite:////app/data/devops_control_tower.db
EXPOSE 8000

HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import http.client, os; tower = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=2); tower.request('GET', '/health'); assert tower.getresponse().status == 200"]

CMD ["python", "-m", "devops_control_tower.main"]
