# A container of fulltune; docs/guides/scale.md, "In a container", says how it is used, and which of this was run, and where.
#   CPU:   docker build --tag fulltune .
#   CUDA:  docker build --tag fulltune:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .

# Debian 12 has Python 3.11, with which the figures of docs/evidence.md were measured.
ARG BASE=docker.io/library/debian:bookworm-slim
FROM ${BASE}

# What torch.compile and DeepSpeed compile with at run time is needed in the image, too.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ python3-dev python3-venv tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*

# A layer of its own: a change of fulltune does not download torch again.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY locks /usr/src/fulltune/locks
RUN python3 -m venv --upgrade-deps /opt/fulltune \
    && /opt/fulltune/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" \
        --constraint /usr/src/fulltune/locks/tested.txt torch

ARG EXTRAS=quickstart,text-metrics,gguf,images,audit,languages,tensorboard,lightning,trl
COPY pyproject.toml README.md LICENSE /usr/src/fulltune/
COPY src /usr/src/fulltune/src
RUN /opt/fulltune/bin/pip install --no-cache-dir --constraint /usr/src/fulltune/locks/tested.txt \
    "/usr/src/fulltune[${EXTRAS}]"

# With `--user`, a container may run as any user: the home for caches, and the folder that recipes are mounted into, are
# writable for all; and getpass, which torch asks for the name of its cache, needs a name where /etc/passwd has none.
RUN useradd --create-home fulltune && chmod 1777 /home/fulltune && install --directory --mode=1777 /data
ENV HOME=/home/fulltune USER=fulltune PATH=/opt/fulltune/bin:$PATH
USER fulltune
WORKDIR /data
# The first process of a container gets no signal that it does not handle, and inherits processes whose parent has ended:
# tini is it, without --init as well; -s, so that with --init it does not warn that it is the second one.
ENTRYPOINT ["tini", "-s", "--", "fulltune"]
CMD ["quickstart"]
LABEL org.opencontainers.image.title="fulltune" \
    org.opencontainers.image.description="Fine-tune every parameter of a pretrained model, safely, and prove with numbers whether it was worth it." \
    org.opencontainers.image.licenses="Apache-2.0"
