#!/bin/sh
# kvpress needs transformers below 5.3, kvmosaic 5.17 or newer: an environment of its own, beside this file.
set -eu
cd "$(dirname "$0")"
${PYTHON:-python3} -m venv .venv
.venv/bin/pip install --quiet torch==2.13.0 transformers==5.2.0 kvpress==0.5.5
