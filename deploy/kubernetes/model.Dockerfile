# A model as an image, for the workers' init container:
#
#   docker build --file deploy/kubernetes/model.Dockerfile --tag carousel-model:demo models/demo

FROM busybox:1.37.0
COPY --chown=10001:10001 . /bundle
USER 10001:10001
