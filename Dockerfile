# liar_ext for CPUs.
#   docker build -t liar .
#   docker run --rm -v "$PWD:/work" liar prune MODEL --calibration text.jsonl --out pruned
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS torch
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu 'torch>=2.10' \
 && pip install --no-cache-dir numpy

FROM torch AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++
RUN pip install --no-cache-dir 'setuptools>=77' ninja
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY liar_ext liar_ext
RUN LIAR_CUDA=0 pip wheel --no-cache-dir --no-build-isolation --no-deps -w /wheels .

FROM torch
ARG EXTRAS=gguf,report
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[${EXTRAS}]"
# Where models are cached, and where code of pruned folders is copied to: mount it to keep it.
ENV HF_HOME=/work/.cache/huggingface
RUN useradd --uid 1000 --create-home liar
USER liar
WORKDIR /work
ENTRYPOINT ["liar"]
CMD ["doctor"]
