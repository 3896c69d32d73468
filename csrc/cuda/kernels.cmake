# The CUDA kernels: an image for each rule, which the module contains and loads when it is first used.
set(architectures ${FUSEDOPT_CUDA_ARCHITECTURES})
foreach(architecture IN LISTS architectures)
  list(APPEND cuda_targets -gencode arch=compute_${architecture},code=sm_${architecture})
endforeach()
# GPUs to come compile the newest one's intermediate form.
list(GET architectures -1 newest)
list(APPEND cuda_targets -gencode arch=compute_${newest},code=compute_${newest})
# IEEE rounding, nothing contracted. Not all of a header's local functions are used by all.
set(cuda_flags -std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false -diag-suppress 177
               -ccbin ${CMAKE_CXX_COMPILER} ${cuda_targets} -fatbin)
set(cuda_folder ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda)

# A compiler of the host that this nvcc does not know, an architecture it does not have: better seen here.
execute_process(COMMAND ${FUSEDOPT_NVCC} --version OUTPUT_VARIABLE said)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" said "${said}")
set(toolkit "${CMAKE_MATCH_1}")
if(toolkit VERSION_LESS 12.1)
  set(problem "it is of CUDA '${toolkit}', and the kernels need 12.1")
else()
  if(toolkit VERSION_GREATER_EQUAL 12.9)
    list(APPEND cuda_flags --compress-mode=size)
  endif()
  execute_process(COMMAND ${FUSEDOPT_NVCC} ${cuda_flags} -o ${CMAKE_CURRENT_BINARY_DIR}/trial.fatbin norm.cu
                  WORKING_DIRECTORY ${cuda_folder} RESULT_VARIABLE failed ERROR_VARIABLE problem)
  if(NOT failed)
    set(problem "")
  endif()
endif()
if(problem)
  set(kind WARNING)
  if(FUSEDOPT_CUDA_REQUIRED)
    set(kind FATAL_ERROR)
  endif()
  message(${kind} "fusedopt: ${FUSEDOPT_NVCC} cannot build the CUDA kernels, and FUSEDOPT_CUDA=0 builds without them: "
                  "${problem}")
  return()
endif()

file(READ csrc/rules.h rules)
string(REGEX REPLACE ".*#define FUSEDOPT_RULES\\(X\\)" "" rules "${rules}")
string(REGEX MATCHALL "[a-z_0-9]+\\)" rules "${rules}")
string(REPLACE ")" "" rules "${rules}")
set(kernel_headers csrc/rules.h csrc/functions.h csrc/int8.h csrc/codecs.h csrc/parameter.h csrc/cuda/arguments.h
                   csrc/cuda/memory.cuh csrc/cuda/codecs.cuh csrc/cuda/step.cuh csrc/cuda/norm.cuh)
foreach(image IN LISTS rules ITEMS norm)
  set(file ${CMAKE_CURRENT_BINARY_DIR}/${image}.fatbin)
  set(source step.cu -DFUSEDOPT_RULE=${image})
  if(image STREQUAL norm)
    set(source norm.cu)
  endif()
  add_custom_command(
    OUTPUT ${file}
    COMMAND ${FUSEDOPT_NVCC} ${cuda_flags} -o ${file} ${source}
    WORKING_DIRECTORY ${cuda_folder}
    DEPENDS csrc/cuda/step.cu csrc/cuda/norm.cu ${kernel_headers}
    VERBATIM)
  list(APPEND images ${file})
endforeach()
list(JOIN architectures " " architectures)
set_source_files_properties(
  csrc/cuda/kernels.cpp
  PROPERTIES OBJECT_DEPENDS "${images}"
             COMPILE_OPTIONS "-Wa,-I${CMAKE_CURRENT_BINARY_DIR}"
             COMPILE_DEFINITIONS
             "FUSEDOPT_CUDA_TOOLKIT=\"${toolkit}\";FUSEDOPT_CUDA_ARCHITECTURES=\"${architectures}\"")
