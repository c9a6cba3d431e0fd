# q.sh TREE T COPY
nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 --expt-relaxed-constexpr -I$1/libetap/include -I$1/libetap/src -Xptxas -v,--warn-on-spills -DT1=$2 -DCOPY1=$3 -c one.cu -o one_$3.o 2>&1 | grep -E "spill|error|Used" | head -5
