# variant.sh LIBS NAME SED [FILE]: LIBS/NAME.so, the library of the tree it runs in (built before) with an edit of a file of libetap/src/sm90, kernels/rows_on_m.cuh; for the NVCC and flags of `make -n V=1`
libs=$1; n=$2; tree=$PWD; v=$(mktemp -d); mkdir $v/o; cp -r libetap $v/; cd $v
sed -i "$3" libetap/src/sm90/${4:-kernels/rows_on_m.cuh}
nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 --expt-relaxed-constexpr -Ilibetap/include -Ilibetap/src -Xcompiler -fPIC,-fvisibility=hidden -Xptxas --warn-on-spills -Xfatbin -compress-all \
  -DETAP_FAMILY=rows_on_m '-DETAP_FAMILY_HEADER="sm90/kernels/rows_on_m.cuh"' -DETAP_ROWS=64 -c libetap/src/sm90/instance.cu -o o/rows.o 2>&1 | grep -i "warning\|error"
cd $tree && eval "$(make -n -o .venv/.complete -W build/obj/sm90/instances/rows_on_m_n64.o CUDA=1 all | grep -m1 version-script=libetap/libetap.map | sed "s#build/obj/sm90/instances/rows_on_m_n64.o#$v/o/rows.o#; s#-o build/[^ ]*#-o $libs/$n.so#")"
rm -rf $v
