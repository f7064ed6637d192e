# The images: two targets per model. `docker buildx bake --print` shows the arguments of each.
#
#   docker buildx bake wan22_14b_t2v                       contains the model's weights
#   docker buildx bake wan22_14b_t2v-slim                  takes the weights from a network volume or the platform's model cache
#   REGISTRY=docker.io/me VERSION=1.0.0 docker buildx bake --push all
#
# `MODELS` lists the models of pipelines/catalog.py; a test compares the two.

variable "REGISTRY" {
  default = "docker.io/library"
}

variable "VERSION" {
  default = "dev"
}

variable "COMMIT" {
  default = "unknown"
}

# URL of the source repository, such as https://github.com/me/worker-wan-lora.
variable "SOURCE" {
  default = ""
}

variable "BASE_IMAGE" {
  default = "debian:bookworm-slim"
}

# Hub commits, as ORG/NAME=SHA,ORG/NAME=SHA; the main branch is used for other repos. One list serves all models.
variable "REVISIONS" {
  default = ""
}

# The commit of ostris/ai-toolkit that the worker was tested with.
variable "AI_TOOLKIT_COMMIT" {
  default = "27a03a91f23eb1b757d5ec2e80ee3e129cfcc350"
}

# A format such as qfloat8: baked images contain their weights as codes, and their tag ends in it.
variable "QUANTIZE" {
  default = ""
}

# 1: the image contains a C compiler, for torch.compile.
variable "COMPILE" {
  default = "0"
}

# 1: baked images contain the distilled LoRAs of their model's drafts.
variable "DRAFT" {
  default = "0"
}

# hub: the real weights; tiny: random weights of a few MB.
variable "CHECKPOINTS" {
  default = "hub"
}

# 1980-01-01: the modification time of every file, so that the same content makes the same layer. As in builder/__init__.py.
variable "SOURCE_DATE_EPOCH" {
  default = "315532800"
}

variable "MODELS" {
  default = [
    "wan22_14b_i2v",
    "wan22_14b_t2v",
    "wan22_5b",
    "wan21_i2v_14b",
    "wan21_i2v_14b480p",
    "wan21_14b",
    "wan21_1b",
  ]
}

# Not all models: together the `baked` images have about 500 GB.
group "default" {
  targets = ["wan21_1b"]
}

group "all" {
  targets = ["baked", "slim"]
}

target "_common" {
  context    = "."
  dockerfile = "Dockerfile"
  platforms  = ["linux/amd64"]
  args = {
    BASE_IMAGE        = BASE_IMAGE
    CHECKPOINTS       = CHECKPOINTS
    AI_TOOLKIT_COMMIT = AI_TOOLKIT_COMMIT
    COMPILE           = COMPILE
    VERSION           = VERSION
    COMMIT            = COMMIT
    SOURCE_DATE_EPOCH = SOURCE_DATE_EPOCH
  }
  labels = {
    "org.opencontainers.image.title"    = "worker-wan-lora"
    "org.opencontainers.image.licenses" = "Apache-2.0"
    "org.opencontainers.image.source"   = SOURCE
    "org.opencontainers.image.version"  = VERSION
    "org.opencontainers.image.revision" = COMMIT
    "worker-wan-lora.ai-toolkit"        = AI_TOOLKIT_COMMIT
  }
  output = ["type=image,rewrite-timestamp=true"]
}

target "baked" {
  name     = model
  matrix   = { model = MODELS }
  inherits = ["_common"]
  target   = "baked"
  args = {
    MODEL_ID  = model
    REVISIONS = REVISIONS
    DRAFT     = DRAFT
    QUANTIZE  = QUANTIZE
  }
  labels = {
    "worker-wan-lora.model"       = model
    "worker-wan-lora.checkpoints" = REVISIONS
  }
  secret = ["id=HF_TOKEN,env=HF_TOKEN"]
  tags   = ["${REGISTRY}/worker-wan-lora:${VERSION}-${model}${QUANTIZE != "" ? "-${QUANTIZE}" : ""}"]
}

target "slim" {
  name     = "${model}-slim"
  matrix   = { model = MODELS }
  inherits = ["_common"]
  target   = "slim"
  args     = { MODEL_ID = model }
  labels   = { "worker-wan-lora.model" = model }
  tags     = ["${REGISTRY}/worker-wan-lora:${VERSION}-${model}-slim"]
}
