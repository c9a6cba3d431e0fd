export PYTHONPATH=$PWD:$PWD/bench:$PWD/integrations/sglang:$PWD/integrations/vllm:$PWD/integrations:$PWD/.gpu/site
for d in integrations/*/; do PYTHONPATH=$PYTHONPATH:$PWD/$d; done
export PYTHONPATH ETAP_PROBE_LIBRARY=$PWD/.gpu/libs/libetap_probe.so
