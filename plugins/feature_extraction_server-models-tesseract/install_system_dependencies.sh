#!/bin/bash
# Tesseract and its English. Other languages are packages of their own, as tesseract-ocr-deu.
set -eu

export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet
apt-get install --yes --quiet --no-install-recommends tesseract-ocr tesseract-ocr-eng
